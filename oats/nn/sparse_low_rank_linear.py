"""`SparseLowRankLinear`: a drop-in for `torch.nn.Linear` whose weight is sparse plus low-rank."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from oats.config import EXACT, Storage
from oats.errors import ConfigError, FormatError
from oats.format.bitmask import encode
from oats.format.layer_spec import (
    DTYPES,
    MARKER,
    TENSORS,
    LayerSpec,
    exact_parts,
    storage_dtype,
    tensor_names,
)
from oats.format.validation import validate
from oats.kernels.cuda.availability import check_cuda_kernels, computes_unpacked
from oats.kernels.eager import is_plain
from oats.kernels.packing import clone_packed, pack, packed_isa, unpack
from oats.kernels.sparse_low_rank_linear import linear
from oats.kernels.to_dense import to_dense

if TYPE_CHECKING:
    from oats.config import OatsConfig
    from oats.decomposition.result import Decomposition

# By name here: they are called for every product.
_OPERATOR = torch.ops.oats.sparse_low_rank_linear
_is_grad_enabled = torch.is_grad_enabled


class SparseLowRankLinear(nn.Module):
    """``y = S x + U (V x) + b``, in one fused kernel.

    The weight has two forms. The *canonical* one is what a checkpoint holds: the buffers ``mask``,
    ``values``, ``low_rank_u`` and ``low_rank_v`` (docs/format.md). The *packed* one is what the kernels of
    this machine read. :meth:`pack_` makes the packed form and drops the canonical one, so memory holds the
    weight once. `state_dict` and `pickle` always give the canonical form.

    The constructor makes an uninitialised canonical layer, which a checkpoint loader fills in. To make a
    layer from a weight, use :meth:`from_linear` or :meth:`from_decomposition`.

    Args:
        in_features: d_in.
        out_features: d_out.
        rank: of the low-rank part.
        nnz: number of values kept in the sparse part.
        bias: True to have a bias.
        dtype: torch.bfloat16 or torch.float32, of inputs, outputs and the numbers that are no codes; None
            means torch's default dtype.
        device: of the canonical buffers; "meta" allocates nothing.
        storage: which of values and factors are codes; codes add buffers for their scales (docs/format.md).

    Attributes:
        spec: the layer's sizes, dtype and storage.

    >>> from oats import OatsConfig
    >>> layer = SparseLowRankLinear.from_linear(nn.Linear(64, 32), torch.ones(64), OatsConfig())
    >>> layer(torch.zeros(2, 64)).shape
    torch.Size([2, 32])
    """

    # None in the form that the layer is not in.
    mask: Tensor | None
    values: Tensor | None
    low_rank_u: Tensor | None
    low_rank_v: Tensor | None
    packed: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        nnz: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        storage: Storage = EXACT,
    ) -> None:
        super().__init__()
        dtype = _supported(dtype or torch.get_default_dtype())
        self.in_features, self.out_features, self.rank, self.nnz = in_features, out_features, rank, nnz
        # One attribute for forward(): reading a module's takes several times as long as a dataclass's.
        self.spec = LayerSpec(out_features, in_features, rank, nnz, dtype, storage)
        for name, (kind, shape) in self.spec.tensors().items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.register_buffer("packed", None, persistent=False)
        made = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if made is None else nn.Parameter(made, requires_grad=False))

    @classmethod
    def from_canonical(
        cls,
        tensors: Mapping[str, Tensor],
        in_features: int,
        bias: Tensor | None = None,
        name: str = "layer",
        *,
        storage: Storage = EXACT,
        dtype: torch.dtype | None = None,
    ) -> SparseLowRankLinear:
        """Make a packed layer from the tensors of :mod:`oats.format.layer_spec`.

        Args:
            tensors: ``mask`` unless every element of S is kept, ``values``, ``low_rank_u``, ``low_rank_v``,
                and the scales and codebook that `storage` has.
            in_features: d_in; the mask has up to 7 more columns.
            bias: (d_out,) or None.
            name: for error messages.
            storage: which of values and factors are codes.
            dtype: of inputs and outputs; None means that of the values, which must not be codes then.

        Raises:
            FormatError: the tensors disagree.
        """
        storage = replace(storage, mask="mask" in tensors)
        spec = LayerSpec.of(tensors, in_features, storage, dtype)
        sizes = in_features, spec.d_out, spec.rank, spec.nnz
        layer = cls(*sizes, bias is not None, spec.dtype, device="meta", storage=storage)
        for tensor_name in layer._stored_names():
            setattr(layer, tensor_name, tensors[tensor_name])
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer.pack_(name)

    @classmethod
    def from_decomposition(
        cls, decomposition: Decomposition, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> SparseLowRankLinear:
        """Make a packed layer from ``W ≈ S + U V``.

        Args:
            decomposition: from :func:`oats.decompose`.
            bias: (d_out,) or None.
            dtype: torch.bfloat16 or torch.float32; None means the decomposition's own (bf16 for fp16).

        Raises:
            ConfigError: the dtype is another one.
        """
        dtype = _supported(dtype or storage_dtype(decomposition.sparse.dtype))
        mask, values = encode(decomposition.sparse)
        exact = values, decomposition.low_rank_u, decomposition.low_rank_v
        tensors = dict(zip(TENSORS, (mask, *(part.to(dtype) for part in exact)), strict=True))
        return cls.from_canonical(tensors, decomposition.d_in, bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, statistic: Tensor, config: OatsConfig) -> SparseLowRankLinear:
        """Decompose and pack the weight of `linear`.

        Args:
            linear: (d_in → d_out); left as it is.
            statistic: of the inputs, a sum or mean over tokens: for "oats" of x_j², (d_in,); for
                "oats-hessian" of x xᵀ, (d_in, d_in).
            config: settings of the compression.

        Raises:
            WeightError: the weight or the statistic cannot be used.
            ConfigError: the settings cannot be met for this shape.
        """
        from oats.decomposition.methods import decompose_by_method

        decomposition = decompose_by_method(linear.weight, statistic, config)
        dtype = None if config.dtype is None else DTYPES[config.dtype]
        return cls.from_decomposition(decomposition, linear.bias, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs, outputs and the numbers that are no codes."""
        if self.values is None or self.storage.values != "exact":
            return self.spec.dtype
        return self.values.dtype

    @property
    def storage(self) -> Storage:
        """Which of the stored numbers are codes."""
        return self.spec.storage

    def _stored_names(self) -> list[str]:
        return list(tensor_names(self.storage))

    @property
    def weight(self) -> Tensor:
        """The dense ``S + U V``, (d_out, d_in). Each access computes it: for inspection, not for speed."""
        return self.to_dense()

    def to_dense(self) -> Tensor:
        """The dense ``S + U V``, (d_out, d_in) in the layer's dtype, summed in fp32."""
        if self._computes_unpacked():
            sparse, u, v = exact_parts(self.canonical(), self.storage)
            return sparse.addmm_(u, v).to(self.dtype)
        if self.packed is None:
            self.pack_()
        return to_dense(self.packed, *self.spec.sizes, self.spec.dtype)  # type: ignore[no-any-return]

    def canonical(self) -> dict[str, Tensor]:
        """The tensors of :mod:`oats.format.layer_spec` by name; a packed layer is unpacked for it."""
        if self.packed is not None:
            return unpack(self.packed, self.spec)
        tensors = {name: getattr(self, name) for name in self._stored_names()}
        # .to(dtype) converts the scales too. They are bfloat16 numbers, so this restores them without loss.
        return {n: t.bfloat16() if n.endswith("_scale") else t for n, t in tensors.items()}

    def _computes_unpacked(self) -> bool:
        """True if this layer must multiply by its unpacked weight because no CUDA kernel supports it."""
        if self.packed is not None or self.values is None:
            return False
        return computes_unpacked(self.values.device, codes=self.storage.has_codes)

    def pack_(self, name: str = "layer") -> SparseLowRankLinear:
        """Check the canonical tensors, lay them out for the device they are on, and drop them.

        Raises:
            FormatError: the tensors disagree with each other or with the layer's shape.
            DeviceError: they are on a CUDA device, and it has no kernels, or none for codes.
        """
        if self.packed is not None:
            return self
        tensors = self.canonical()
        devices = {tensor.device for tensor in tensors.values()}
        device = devices.pop()
        if devices or device.type not in ("cpu", "cuda"):
            raise FormatError(
                f"{name}: the weight is on {', '.join(map(str, {device, *devices}))}; kernels exist for the "
                'CPU and for one CUDA device, load or move the model with device "cpu" or "cuda"'
            )
        check_cuda_kernels(name, device, codes=self.storage.has_codes)
        validate(name, self.out_features, self.in_features, storage=self.storage, bias=self.bias, **tensors)
        spec = LayerSpec.of(tensors, self.in_features, self.storage, self._exact_dtype(tensors))
        if (spec.rank, spec.nnz) != (self.rank, self.nnz):
            raise FormatError(
                f"{name}: rank {spec.rank} and {spec.nnz} values, expected rank {self.rank} and {self.nnz}; "
                "the checkpoint does not match its config"
            )
        _supported(spec.dtype)
        if spec.storage.mask and spec.nnz == spec.d_out * spec.d_in:
            # It says nothing, and without it the kernels read less.
            spec = replace(spec, storage=replace(spec.storage, mask=False))
            del tensors["mask"], self._buffers["mask"]
        self.spec = spec
        if self.bias is not None:
            self.bias.data = self.bias.data.to(spec.dtype).contiguous()
        self.packed = pack(tensors, spec)
        for tensor_name in tensors:
            setattr(self, tensor_name, None)
        return self

    def _exact_dtype(self, tensors: Mapping[str, Tensor]) -> torch.dtype:
        """The dtype of the numbers that are no codes, or the layer's dtype if all are codes."""
        if self.storage.values == "exact":
            return tensors["values"].dtype
        return self.spec.dtype if self.storage.low_rank != "exact" else tensors["low_rank_u"].dtype

    def store_(self, tensors: Mapping[str, Tensor], storage: Storage, name: str = "layer") -> None:
        """Replace the stored tensors by others of the same sizes, and pack them.

        Args:
            tensors: all that a layer of this `storage` has, by name.
            storage: which of their numbers are codes.
            name: for error messages.

        Raises:
            FormatError: they disagree.
        """
        for old in self._stored_names():
            del self._buffers[old]
        self.packed, self.spec = None, replace(self.spec, storage=storage)
        for new in self._stored_names():
            self.register_buffer(new, tensors[new])
        self.pack_(name)

    def _unpack_(self) -> None:
        if self.packed is not None:
            for name, tensor in self.canonical().items():
                setattr(self, name, tensor)
            self.packed = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``S x + U (V x) + b``.

        Args:
            x: (…, in_features), the dtype and device of the layer.

        Returns:
            (…, out_features), the layer's dtype.

        Raises:
            ValueError: `x` has another size, dtype or device.
            DeviceError: the layer is on a CUDA device, and there are no kernels for it.
        """
        # Not self.packed: nn.Module's attribute lookup costs as much as a small product.
        packed, bias, spec = self._buffers["packed"], self._parameters["bias"], self.spec
        if packed is None:
            if self._computes_unpacked():
                return nn.functional.linear(self._accept(x), self.to_dense(), bias)
            packed, spec = self.pack_().packed, self.spec
            assert packed is not None
        shape = x.shape
        if x.dtype is not spec.dtype or not shape or shape[-1] != spec.d_in or x.is_cpu is not packed.is_cpu:
            x = self._accept(x)
        # The operator works with autograd and compilers, and checks a bias that somebody replaced.
        if (
            not is_plain(x)
            or (x.requires_grad and _is_grad_enabled())
            or (bias is not None and not fits_kernel(bias, spec))
        ):
            _refuse_tangent(x)
            return _OPERATOR(x, packed, bias, spec.d_out, spec.rank, spec.nnz)  # type: ignore[no-any-return]
        return linear(x, packed, bias, spec)

    def _accept(self, x: Tensor) -> Tensor:
        """`x`, converted where autocast is on; raises an error that says what is wrong with it."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"input has shape {tuple(x.shape)}, expected (..., {self.in_features})")
        stored = self.values if self.packed is None else self.packed
        device = torch.device("cpu") if stored is None else stored.device
        if x.device.type not in (device.type, "meta"):
            raise ValueError(
                f"input is on {x.device} but the layer on {device}; move one of them with .to(), e.g. "
                f'x.to("{device}")'
            )
        if torch.is_autocast_enabled(device.type):
            x = x.to(self.dtype)
        if x.dtype != self.dtype:
            raise ValueError(
                f"input is {x.dtype} but the layer is {self.dtype}; convert one with .to(), "
                f"e.g. x.to({self.dtype})"
            )
        return x

    def extra_repr(self) -> str:
        """Shape, rank, density, dtype and the instruction set in use."""
        elements = max(self.in_features * self.out_features, 1)
        stored = self.nnz + self.rank * (self.in_features + self.out_features)
        isa = "unpacked" if self.packed is None else packed_isa(self.packed)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}, "
            f"density={self.nnz / elements:.3f}, compression={1 - stored / elements:.3f}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, isa={isa}"
        )

    # The rest keeps the packed form inside this process: whatever is saved or pickled is canonical.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination.update({prefix + name: tensor for name, tensor in self.canonical().items()})
            destination[prefix + "weight"] = MARKER.clone()  # transformers refuses shared tensors

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        drop_marker(state_dict, prefix)
        if self.nnz == self.in_features * self.out_features:
            self._expect_mask_(f"{prefix}mask" in state_dict)
        if self.packed is not None and not any(key.startswith(prefix) for key in state_dict):
            # Nothing here is for this layer, as when an adapter is loaded. It stays packed, and the caller
            # still learns which tensors were missing.
            _, strict, missing, *_ = args
            missing.extend(prefix + name for name in self._stored_names() if strict)
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        self._unpack_()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._pack_again(prefix.removesuffix(".") or "layer")

    def _expect_mask_(self, there: bool) -> None:
        """Take a mask or none; both are right if every element of S is kept."""
        if there == self.storage.mask:
            return
        self._unpack_()
        self.spec = replace(self.spec, storage=replace(self.storage, mask=there))
        if there and self.values is not None:
            shape = self.spec.tensors()["mask"][1]
            self.register_buffer("mask", torch.empty(shape, dtype=torch.uint8, device=self.values.device))
        else:
            del self._buffers["mask"]

    def _pack_again(self, name: str = "layer") -> None:
        """Pack the canonical tensors, except on the meta device and where products use the dense weight."""
        if self.values is not None and not self.values.is_meta and not self._computes_unpacked():
            self.pack_(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLowRankLinear:
        # `fn` changes dtype, device or contents, and that makes sense for the canonical form only.
        probe = torch.empty(0, dtype=self.dtype, device=None if self.packed is None else self.packed.device)
        changed = fn(probe)
        codes = self.storage.has_codes
        if not computes_unpacked(changed.device, codes=codes):
            check_cuda_kernels("the layer", changed.device, codes=codes)
        if self.packed is None or changed is probe:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.spec = replace(self.spec, dtype=changed.dtype)
            return self
        _supported(changed.dtype)
        self._unpack_()
        self.spec = replace(self.spec, dtype=changed.dtype)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with contextlib.suppress(FormatError):  # to_empty leaves nothing that can be packed
            self._pack_again()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLowRankLinear:
        """A copy for this process, in the form that the layer is in."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        if self.packed is not None:
            memo[id(self.packed)] = clone_packed(self.packed)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """The state with canonical tensors, which another machine can read."""
        state = self.__dict__.copy()
        if self.packed is not None:
            state["_buffers"] = {**self._buffers, **self.canonical(), "packed": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and pack for this machine."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack_again()


def drop_marker(state_dict: dict[str, Any], prefix: str) -> None:
    """Remove what stands for the dense weight of a layer (:data:`oats.format.layer_spec.MARKER`)."""
    marker = state_dict.get(prefix + "weight")
    if marker is not None and marker.shape == MARKER.shape:
        del state_dict[prefix + "weight"]


def fits_kernel(bias: Tensor, spec: LayerSpec) -> bool:
    """True if a kernel can read `bias` as it is, and nobody wants a gradient of it."""
    return (
        bias.dtype is spec.dtype
        and bias.shape == (spec.d_out,)
        and bias.is_contiguous()
        and not (bias.requires_grad and _is_grad_enabled())
    )


def _refuse_tangent(x: Tensor) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError("a sparse plus low-rank layer has no forward-mode derivative")


def _supported(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES.values():
        raise ConfigError(
            f"a sparse plus low-rank layer cannot be {dtype}; choose torch.bfloat16 or torch.float32"
        )
    return dtype
