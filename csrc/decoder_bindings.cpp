// The decoder for Python: oats/engine/ fills the description, and keeps alive what its addresses point to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "oats/decoder.h"

namespace py = pybind11;

namespace {

template <class T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

using Tokens = std::vector<int64_t>;

// Rows, their sequences and pages, as Python has them.
struct Sequence {
  int64_t first_row, rows, start;
  std::vector<std::vector<int32_t>> pages;  // of each cache
  std::vector<oats::Rope> ropes;            // in place of the model's, or none
};

}  // namespace

void bind_decoder(py::module_& m) {
  py::enum_<oats::Gate>(m, "Gate")
      .value("none", oats::Gate::none)
      .value("silu", oats::Gate::silu)
      .value("gelu", oats::Gate::gelu)
      .value("gelu_tanh", oats::Gate::gelu_tanh)
      .value("relu", oats::Gate::relu);

  py::class_<oats::DecoderLinear>(m, "DecoderLinear")
      .def(py::init([](int64_t d_out, int64_t d_in, uintptr_t packed, uintptr_t dense, uintptr_t bias) {
             return oats::DecoderLinear{pointer<oats::PackedHeader>(packed), pointer<void>(dense),
                                        pointer<void>(bias), d_out, d_in};
           }),
           py::kw_only(), py::arg("d_out"), py::arg("d_in"), py::arg("packed") = 0, py::arg("dense") = 0,
           py::arg("bias") = 0);

  py::class_<oats::DecoderNorm>(m, "DecoderNorm")
      .def(py::init([](uintptr_t weight, float eps, bool one_plus) {
             return oats::DecoderNorm{pointer<void>(weight), eps, one_plus};
           }),
           py::kw_only(), py::arg("weight") = 0, py::arg("eps") = 0.f, py::arg("one_plus") = false);

  py::class_<oats::Rope>(m, "Rope").def(
      py::init([](std::vector<float> frequencies, float scale) { return oats::Rope{frequencies, scale}; }),
      py::arg("frequencies"), py::arg("scale"));

  py::class_<oats::DecoderExpert>(m, "DecoderExpert")
      .def(py::init([](std::vector<oats::DecoderLinear> gate_up, const oats::DecoderLinear& down) {
             return oats::DecoderExpert{std::move(gate_up), down};
           }),
           py::arg("gate_up"), py::arg("down"));

  using Experts = oats::DecoderExperts;
  py::class_<Experts>(m, "DecoderExperts")
      .def(py::init([](std::vector<oats::DecoderLinear> router, std::vector<oats::DecoderExpert> each,
                       int64_t chosen, bool normalised, bool shared) {
             return Experts{std::move(router), std::move(each), chosen, normalised, shared};
           }),
           py::kw_only(), py::arg("router"), py::arg("each"), py::arg("chosen"), py::arg("normalised"),
           py::arg("shared"));

  using Layer = oats::DecoderLayer;
  py::class_<Layer>(m, "DecoderLayer")
      .def(py::init<>())
      .def_readwrite("before_attention", &Layer::before_attention)
      .def_readwrite("after_attention", &Layer::after_attention)
      .def_readwrite("before_mlp", &Layer::before_mlp)
      .def_readwrite("after_mlp", &Layer::after_mlp)
      .def_readwrite("q_norm", &Layer::q_norm)
      .def_readwrite("k_norm", &Layer::k_norm)
      .def_readwrite("qkv", &Layer::qkv)
      .def_readwrite("attention_out", &Layer::attention_out)
      .def_readwrite("gate_up", &Layer::gate_up)
      .def_readwrite("down", &Layer::down)
      .def_readwrite("experts", &Layer::experts)
      .def_readwrite("heads", &Layer::heads)
      .def_readwrite("kv_heads", &Layer::kv_heads)
      .def_readwrite("head_dim", &Layer::head_dim)
      .def_readwrite("attention_scale", &Layer::attention_scale)
      .def_readwrite("attention_softcap", &Layer::attention_softcap)
      .def_readwrite("window", &Layer::window)
      .def_readwrite("rope", &Layer::rope)
      .def_readwrite("cache", &Layer::cache)
      .def_readwrite("cache_layer", &Layer::cache_layer)
      .def_readwrite("gate", &Layer::gate)
      .def_readwrite("gated", &Layer::gated);

  using Model = oats::DecoderModel;
  py::class_<Model>(m, "DecoderModel")
      .def(py::init([](int value_bytes, int64_t hidden, int64_t vocabulary, uintptr_t embedding,
                       uintptr_t packed_embedding) {
             Model model;
             model.dtype = value_bytes == 4 ? oats::Dtype::fp32 : oats::Dtype::bf16;
             model.hidden = hidden;
             model.vocabulary = vocabulary;
             model.embedding = pointer<void>(embedding);
             model.packed_embedding = pointer<oats::PackedHeader>(packed_embedding);
             return model;
           }),
           py::kw_only(), py::arg("value_bytes"), py::arg("hidden"), py::arg("vocabulary"),
           py::arg("embedding") = 0, py::arg("packed_embedding") = 0)
      .def_readwrite("embedding_scale", &Model::embedding_scale)
      .def_readwrite("residual_scale", &Model::residual_scale)
      .def_readwrite("logits_scale", &Model::logits_scale)
      .def_readwrite("logits_softcap", &Model::logits_softcap)
      .def_readwrite("layers", &Model::layers)
      .def_readwrite("ropes", &Model::ropes)
      .def_readwrite("final_norm", &Model::final_norm)
      .def_readwrite("head", &Model::head);

  py::class_<Sequence>(m, "DecoderSequence")
      .def(py::init([](int64_t first_row, int64_t rows, int64_t start,
                       std::vector<std::vector<int32_t>> pages, std::vector<oats::Rope> ropes) {
             return Sequence{first_row, rows, start, std::move(pages), std::move(ropes)};
           }),
           py::arg("first_row"), py::arg("rows"), py::arg("start"), py::arg("pages"),
           py::arg("ropes") = std::vector<oats::Rope>());

  m.def(
      "most_likely",
      [](uintptr_t logits, int64_t n, int value_bytes) {
        return oats::most_likely(pointer<void>(logits), n,
                                 value_bytes == 4 ? oats::Dtype::fp32 : oats::Dtype::bf16);
      },
      py::arg("logits"), py::arg("n"), py::arg("value_bytes"));

  m.attr("page_tokens") = oats::kPageTokens;

  // caches: address, layer stride and page stride of each, in elements.
  py::class_<oats::Decoder>(m, "Decoder")
      .def(py::init<Model>())
      .def(
          "step",
          [](oats::Decoder& decoder, const Tokens& tokens, const std::vector<Sequence>& sequences,
             const std::vector<std::tuple<uintptr_t, int64_t, int64_t>>& caches, const Tokens& logits_rows,
             uintptr_t logits, int threads) {
            py::gil_scoped_release release;
            std::vector<oats::DecoderSequence> of_core;
            std::vector<std::vector<const int32_t*>> pages(sequences.size());
            of_core.reserve(sequences.size());
            for (size_t i = 0; i < sequences.size(); ++i) {
              for (const auto& table : sequences[i].pages) pages[i].push_back(table.data());
              of_core.push_back({sequences[i].first_row, sequences[i].rows, sequences[i].start,
                                 pages[i].data(),
                                 sequences[i].ropes.empty() ? nullptr : sequences[i].ropes.data()});
            }
            std::vector<oats::KvCache> of_caches;
            for (const auto& [address, layer_stride, page_stride] : caches)
              of_caches.push_back({reinterpret_cast<void*>(address), layer_stride, page_stride});
            decoder.step({tokens.data(), static_cast<int64_t>(tokens.size()), of_core.data(),
                          static_cast<int64_t>(of_core.size()), of_caches.data(), logits_rows.data(),
                          static_cast<int64_t>(logits_rows.size()), reinterpret_cast<void*>(logits)},
                         threads);
          },
          py::arg("tokens"), py::arg("sequences"), py::arg("caches"), py::arg("logits_rows"),
          py::arg("logits"), py::arg("threads"));
}
