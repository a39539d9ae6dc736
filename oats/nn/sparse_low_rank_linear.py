"""`SparseLowRankLinear`: a drop-in for `torch.nn.Linear` whose weight is sparse plus low-rank."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from oats.config import EXACT, Storage
from oats.errors import ConfigError, FormatError
from oats.format.bitmask import encode
from oats.format.layer_spec import (
    DTYPES,
    MARKER,
    LayerSpec,
    exact_parts,
    storage_dtype,
    stored_values,
    tensor_names,
)
from oats.format.validation import validate
from oats.kernels import cuda, ops

if TYPE_CHECKING:
    from oats.config import OatsConfig
    from oats.decomposition.result import Decomposition


_LINEAR = torch.ops.oats.sparse_low_rank_linear

_CUDA_LINEAR = torch.ops.oats.cuda_sparse_low_rank_linear

# By name here: it is called for every product.
_is_grad_enabled = torch.is_grad_enabled


class SparseLowRankLinear(nn.Module):
    """``y = S x + U (V x) + b``, in one fused kernel.

    The weight has two forms. *Canonical* are the buffers ``mask``, ``values``, ``low_rank_u`` and
    ``low_rank_v`` (docs/format.md): what a checkpoint holds. *Packed* is the layout of this
    machine's kernels. :meth:`pack_` goes from the first to the second and drops the first, so that a
    layer is held once; `state_dict` and `pickle` always give the canonical form.

    The constructor makes an uninitialised canonical layer for a checkpoint loader to fill in; to make
    one from a weight use :meth:`from_linear` or :meth:`from_decomposition`.

    Args:
        in_features: d_in.
        out_features: d_out.
        rank: of the low-rank part.
        nnz: number of values kept in the sparse part.
        bias: whether there is a bias.
        dtype: torch.bfloat16 or torch.float32, of inputs, outputs, and what is stored exactly; None means
            torch's default dtype.
        device: where the canonical buffers are made; "meta" makes none.
        storage: whether values and factors are stored exactly or as codes, which adds buffers for their
            scales (docs/format.md).

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
        dtype = self._dtype = _supported(dtype or torch.get_default_dtype())
        self.in_features, self.out_features, self.rank, self.nnz = in_features, out_features, rank, nnz
        self.storage = storage
        tensors = LayerSpec(out_features, in_features, rank, nnz, dtype, storage).tensors()
        for name, (kind, shape) in tensors.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.register_buffer("packed", None, persistent=False)
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
            if bias
            else None,
        )

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
            tensors: ``mask``, ``values``, ``low_rank_u``, ``low_rank_v``, and the scales that `storage` has.
            in_features: d_in, which the mask alone does not tell.
            bias: (d_out,) or None.
            name: of the layer, for error messages.
            storage: how values and factors are stored.
            dtype: of inputs and outputs; None means that of the values, which codes do not tell.

        Raises:
            FormatError: the tensors disagree.
        """
        mask, values = tensors["mask"], tensors["values"]
        nnz = stored_values(mask, values, in_features, storage)
        layer = cls(
            in_features,
            mask.shape[0],
            tensors["low_rank_v"].shape[0],
            nnz,
            bias=bias is not None,
            dtype=dtype or values.dtype,
            device="meta",
            storage=storage,
        )
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
        tensors = {
            "mask": mask,
            "values": values.to(dtype),
            "low_rank_u": decomposition.low_rank_u.to(dtype),
            "low_rank_v": decomposition.low_rank_v.to(dtype),
        }
        return cls.from_canonical(tensors, decomposition.sparse.shape[1], bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, statistic: Tensor, config: OatsConfig) -> SparseLowRankLinear:
        """Decompose and pack the weight of `linear`.

        Args:
            linear: (d_in → d_out); left as it is.
            statistic: what the method needs to know of the inputs: for "oats" (d_in,), the sum or mean over
                tokens of x_j²; for "oats-hessian" that of x xᵀ, (d_in, d_in).
            config: the compression's settings.

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
        """Of the inputs, the outputs, and what is stored exactly."""
        if self.values is None or self.storage.values != "exact":
            return self._dtype
        return self.values.dtype

    def _stored_names(self) -> list[str]:
        return list(tensor_names(self.storage))

    @property
    def weight(self) -> Tensor:
        """The dense ``S + U V``, (d_out, d_in). Computed at each access: for inspection, not for speed."""
        return self.to_dense()

    def to_dense(self) -> Tensor:
        """The dense ``S + U V``, (d_out, d_in) in the layer's dtype, summed in fp32."""
        if self._computes_unpacked():
            sparse, u, v = exact_parts(self.canonical(), self.storage)
            return sparse.addmm_(u, v).to(self.dtype)
        if self.packed is None:
            self.pack_()
        assert self.packed is not None
        dense: Tensor
        if self.packed.is_cuda:
            dense = cuda.to_dense(self.packed, *self._sizes, self.dtype)
            return dense
        dense = ops.to_dense(self.packed, self.out_features, self.in_features, self.dtype)
        return dense

    def canonical(self) -> dict[str, Tensor]:
        """The tensors of :mod:`oats.format.layer_spec`; computed where the layer is packed."""
        if self.packed is not None and self.packed.is_cuda:
            return cuda.unpack(self.packed, self._sizes, self._dtype)
        if self.packed is not None:
            return ops.unpack(self.packed)
        tensors = {name: getattr(self, name) for name in self._stored_names()}
        # A conversion of the module converts its scales, which come back without loss.
        return {n: t.bfloat16() if n.endswith("_scale") else t for n, t in tensors.items()}

    @property
    def _sizes(self) -> cuda.Sizes:
        return cuda.Sizes(self.out_features, self.in_features, self.rank, self.nnz)

    def _computes_unpacked(self) -> bool:
        """Whether products are dense ones, for want of kernels for the CUDA device that the weight is on."""
        return (
            self.packed is None
            and self.values is not None
            and self.values.is_cuda
            and (self.storage.has_codes or not cuda.is_built())
            and cuda.fallback()
        )

    def pack_(self, name: str = "layer") -> SparseLowRankLinear:
        """Check the canonical tensors, lay them out for the device they are on, and drop them.

        Args:
            name: of the layer, for error messages.

        Raises:
            FormatError: the tensors disagree with each other or with the layer's shape.
            DeviceError: they are on a CUDA device, and there are no kernels for it, or for codes on it.
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
        if device.type == "cuda":
            cuda.require(name, codes=self.storage.has_codes)
        validate(name, self.out_features, self.in_features, storage=self.storage, bias=self.bias, **tensors)
        nnz = stored_values(tensors["mask"], tensors["values"], self.in_features, self.storage)
        if tensors["low_rank_v"].shape[0] != self.rank or nnz != self.nnz:
            raise FormatError(
                f"{name}: rank {tensors['low_rank_v'].shape[0]} and {nnz} values, "
                f"expected rank {self.rank} and {self.nnz}; the checkpoint does not match its config"
            )
        self._dtype = _supported(self._exact_dtype(tensors))
        if self.bias is not None:
            self.bias.data = self.bias.data.to(self._dtype).contiguous()
        if device.type == "cuda":
            self.packed = cuda.pack(**tensors, dtype=self._dtype)
        else:
            self.packed = ops.pack(**tensors, storage=self.storage, dtype=self._dtype)  # type: ignore[arg-type]
        for tensor_name in tensors:
            setattr(self, tensor_name, None)
        return self

    def _exact_dtype(self, tensors: Mapping[str, Tensor]) -> torch.dtype:
        """The dtype of what is stored exactly, or the layer's own where nothing is."""
        if self.storage.values == "exact":
            return tensors["values"].dtype
        return self._dtype if self.storage.low_rank != "exact" else tensors["low_rank_u"].dtype

    def store_(self, tensors: Mapping[str, Tensor], storage: Storage, name: str = "layer") -> None:
        """Replace what the layer stores by other tensors of the same shape of layer, and pack them.

        Args:
            tensors: those that `storage` has.
            storage: how they are stored.
            name: of the layer, for error messages.

        Raises:
            FormatError: they disagree.
        """
        for old in self._stored_names():
            del self._buffers[old]
        self.packed, self.storage = None, storage
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
        # Past nn.Module's attribute lookup, which costs as much as a small product.
        packed, bias = self._buffers["packed"], self._parameters["bias"]
        if packed is None:
            if self._computes_unpacked():
                return nn.functional.linear(self._accept(x), self.to_dense(), bias)
            packed = self.pack_().packed
            assert packed is not None
        if packed.is_cuda:
            return self._forward_on_cuda(x, packed, bias)
        if x.dtype is not self._dtype or x.dim() == 0 or x.shape[-1] != self.in_features or not x.is_cpu:
            x = self._accept(x)
        # The operator knows autograd and the compiler, and checks a bias that was replaced.
        if (
            not ops.is_plain(x)
            or (x.requires_grad and _is_grad_enabled())
            or (bias is not None and not self._is_plain(bias))
        ):
            _refuse_tangent(x)
            return _LINEAR(x, packed, bias, self.out_features)  # type: ignore[no-any-return]
        return ops.linear(x, packed, bias, self.out_features)

    def _forward_on_cuda(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype is not self._dtype or x.dim() == 0 or x.shape[-1] != self.in_features or not x.is_cuda:
            x = self._accept(x)
        if (
            ops.is_plain(x)
            and not (x.requires_grad and _is_grad_enabled())
            and x.device == packed.device
            and (bias is None or (self._is_plain(bias) and bias.device == x.device))
        ):
            return cuda.linear(x, packed, bias, self._sizes)
        _refuse_tangent(x)
        return _CUDA_LINEAR(x, packed, bias, self.out_features, self.rank, self.nnz)  # type: ignore[no-any-return]

    def _is_plain(self, bias: Tensor | None) -> bool:
        """Whether the kernels can take `bias` as it is, and no gradient of it is wanted."""
        return bias is None or (
            bias.dtype is self._dtype
            and bias.shape == (self.out_features,)
            and bias.is_contiguous()
            and not (bias.requires_grad and _is_grad_enabled())
        )

    def _accept(self, x: Tensor) -> Tensor:
        """`x` where it is unusual but right, else an error."""
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
        isa = "unpacked"
        if self.packed is not None:
            isa = "cuda" if self.packed.is_cuda else ops.packed_isa(self.packed)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.rank}, "
            f"density={self.nnz / elements:.3f}, compression={1 - stored / elements:.3f}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, isa={isa}"
        )

    # What follows keeps the packed form out of everything that leaves the process.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination.update({prefix + name: tensor for name, tensor in self.canonical().items()})
            destination[prefix + "weight"] = MARKER.clone()  # transformers refuses shared tensors

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        marker = state_dict.get(prefix + "weight")
        if marker is not None and marker.shape == MARKER.shape:
            del state_dict[prefix + "weight"]
        if self.packed is not None and not any(key.startswith(prefix) for key in state_dict):
            # The tensors of an adapter, for one: the layer stays packed, what it lacks is named as ever.
            _, strict, missing, *_ = args
            missing.extend(prefix + name for name in self._stored_names() if strict)
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        self._unpack_()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._pack_again(prefix.removesuffix(".") or "layer")

    def _pack_again(self, name: str = "layer") -> None:
        """Pack what has come, unless it is on a device that computes with the unpacked weight, or on none."""
        if self.values is not None and not self.values.is_meta and not self._computes_unpacked():
            self.pack_(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLowRankLinear:
        # What `fn` changes (dtype, device, contents) it must change in the canonical form.
        probe = torch.empty(0, dtype=self.dtype, device=None if self.packed is None else self.packed.device)
        changed = fn(probe)
        if changed.is_cuda and not cuda.fallback():
            cuda.require("the layer", codes=self.storage.has_codes)
        if self.packed is None or changed is probe:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._dtype = changed.dtype
            return self
        self._dtype = _supported(changed.dtype)
        self._unpack_()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with contextlib.suppress(FormatError):  # to_empty leaves nothing that can be packed
            self._pack_again()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLowRankLinear:
        """A copy for this process, in the form that the layer is in."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        if self.packed is not None:
            # As kernels need it; CUDA's allocator always aligns.
            new = torch.empty_like if self.packed.is_cuda else lambda old: ops._aligned(old.numel())
            packed = new(self.packed).copy_(self.packed)
            memo[id(self.packed)] = packed
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


def projections_of(layers: Iterable[nn.Module | None], x: Tensor) -> list[ops.Projection] | None:
    """What :func:`oats.kernels.ops.linear_many` needs to do the work of several layers that all read `x`.

    Returns:
        None where only calling each layer does what the caller expects: it is of another kind, or has hooks;
        or `x` has another dtype or size, or is one that autograd, a compiler or a tracer follows.
    """
    if not x.is_cpu or not ops.is_plain(x) or x.dim() == 0 or (torch.is_grad_enabled() and x.requires_grad):
        return None
    if _has_any_global_hook():
        return None
    dtype, d_in = x.dtype, x.shape[-1]
    projections: list[ops.Projection] = []
    for layer in layers:
        if type(layer) is not SparseLowRankLinear or layer.in_features != d_in:
            return None
        packed, bias = layer._buffers["packed"], layer._parameters["bias"]
        if (
            packed is None
            or packed.is_cuda
            or layer._dtype is not dtype
            or not layer._is_plain(bias)
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or "forward" in layer.__dict__
        ):
            return None
        projections.append((packed, bias, layer.out_features))
    return projections


def _refuse_tangent(x: Tensor) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError("a sparse plus low-rank layer has no forward-mode derivative")


def _supported(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES.values():
        raise ConfigError(
            f"a sparse plus low-rank layer cannot be {dtype}; choose torch.bfloat16 or torch.float32"
        )
    return dtype
