"""State dicts of DINOv2 backbones as others write them, to the official keys and back.

| format | told by | differs from the official keys in |
|---|---|---|
| official | `mask_token`, `blocks.0...` | nothing; training checkpoints add `teacher`, `backbone.` and chunks |
| own | the same | nothing; it is safetensors with a few words of metadata |
| huggingface | `embeddings.cls_token` | names, and three separate matrices for query, key and value |
| timm | `blocks.0...` without `mask_token` | no mask token, other register and SwiGLU names, and, with registers, the \
cls row of the positional embedding added into the cls token |

Sources: transformers models/dinov2 and models/dinov2_with_registers, timm models/vision_transformer.py.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dense_heads.backbones.vit import VisionTransformer
from dense_heads.errors import UserError, unknown_name

State = dict[str, Tensor]
FORMATS = ("official", "huggingface", "timm", "own")

_CONTAINERS = ("teacher", "state_dict", "model")  # official training checkpoints, Lightning-style, timm-style
_WRAPPERS = ("module.", "backbone.", "dinov2.", "dinov2_with_registers.")
# What stands beside a backbone in a file: projection heads of the training, classifiers.
_BESIDE = ("dino_head.", "ibot_head.", "classifier.", "head.")

# official name <-> name in Hugging Face files, outside the blocks and within one
_HF_TOP = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HF_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "ls2.gamma": "layer_scale2.lambda1",
}
_HF_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
# transformers 5 has other names in memory than in its files; accepted when reading
_HF_IN_MEMORY = {
    "attention.q_proj": _HF_QKV[0],
    "attention.k_proj": _HF_QKV[1],
    "attention.v_proj": _HF_QKV[2],
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}
_HF_GATED = ("mlp.gate_proj", "mlp.up_proj")


def convert(state: Mapping[str, object], to: str = "official") -> State:
    """A backbone's state dict, in whatever of the formats it is, in the format `to`.

    Raises:
        UserError: unknown format; not a backbone's state dict.
    """
    if to not in FORMATS:
        raise unknown_name("weights format", str(to), FORMATS)
    official = _to_official(_unwrap(state))
    if to == "huggingface":
        return _to_huggingface(official)
    return _to_timm(official) if to == "timm" else official


def huggingface_config(backbone: VisionTransformer) -> dict[str, Any]:
    """What transformers' `Dinov2Config` or `Dinov2WithRegistersConfig` says of this backbone.

    Without registers transformers resizes positions in a way of its own: equal at the stored grid (518 x 518) only.
    """
    registers = backbone.num_registers > 0
    config: dict[str, Any] = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.num_blocks,
        "num_attention_heads": backbone.num_heads,
        "num_channels": backbone.in_channels,
        "patch_size": backbone.patch_size,
        "image_size": backbone.patch_size * backbone.grid_size,
        "use_swiglu_ffn": backbone.ffn == "swiglu",
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return config | {"num_register_tokens": backbone.num_registers} if registers else config


def detect(state: Mapping[str, object]) -> str:
    """Which format an unwrapped state dict is in, by its keys.

    Raises:
        UserError: none of them.
    """
    if "embeddings.cls_token" in state or any(key.startswith("encoder.layer.") for key in state):
        return "huggingface"
    if any(key.startswith("blocks.") for key in state):
        return "official" if "mask_token" in state or "register_tokens" in state else "timm"
    raise UserError(
        f"These are not the weights of a DINOv2 backbone: the keys are {_some(state)}. Expected those of an official "
        ".pth file (blocks.0.norm1.weight, ...), of a Hugging Face Dinov2Model (encoder.layer.0....), or of timm."
    )


def _unwrap(state: Mapping[str, object]) -> State:
    """The backbone's tensors alone, without containers, prefixes, and heads."""
    for container in _CONTAINERS:
        inner = state.get(container)
        if isinstance(inner, Mapping):
            state = inner
    tensors: State = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise UserError(f"Got a state dict with the key {key!r}; expected names of tensors.")
        if key.startswith(_BESIDE):
            continue
        for wrapper in _WRAPPERS:
            key = key.removeprefix(wrapper)
        if key.startswith(_BESIDE):
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise UserError(f"Got {type(value).__name__} under {key!r}; expected a dense tensor. Is it a checkpoint?")
        if not value.is_floating_point():
            raise UserError(f"Got {value.dtype} under {key!r}; expected floating-point weights.")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            # A few bytes can claim any shape; what follows would reserve memory for it.
            raise UserError(f"Got a tensor of {tuple(value.shape)} under {key!r} with fewer numbers than that.")
        if key in tensors:
            raise UserError(f"Got {key!r} twice, under different prefixes; expected the weights of one backbone.")
        tensors[key] = value.detach()
    return tensors


def _to_official(state: State) -> State:
    source = detect(state)
    if source == "huggingface":
        return _from_huggingface(state)
    # `block_chunks` of the training groups blocks: blocks.<chunk>.<block>.<rest>
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}
    return _from_timm(state) if source == "timm" else state


def _from_huggingface(state: State) -> State:
    state = _hf_file_names(state)
    top = {theirs: ours for ours, theirs in _HF_TOP.items()}
    block = {theirs: ours for ours, theirs in _HF_BLOCK.items()}
    official: State = {}
    for key, value in state.items():
        match = re.match(r"encoder\.layer\.(\d+)\.(.+?)(\.weight|\.bias|)$", key)
        if match is None:
            stem, dot, kind = key.rpartition(".")
            official[top.get(key) or (top[stem] + dot + kind if stem in top else key)] = value
            continue
        index, part, kind = match.groups()
        if part not in _HF_QKV:
            official[f"blocks.{index}.{block.get(part, part)}{kind}"] = value
        elif part == _HF_QKV[0]:
            official[f"blocks.{index}.attn.qkv{kind}"] = _stack(state, f"encoder.layer.{index}.", _HF_QKV, kind)
        elif f"encoder.layer.{index}.{_HF_QKV[0]}{kind}" not in state:
            raise UserError(f"{key} has no {_HF_QKV[0].rpartition('.')[2]} beside it: the weights are not complete.")
    return _with_mask_token(official)


def _hf_file_names(state: State) -> State:
    """Renames what transformers 5 calls differently in memory, and packs its two SwiGLU matrices."""
    renamed: State = {}
    for key, value in state.items():
        match = re.match(r"(encoder\.layer\.\d+\.)(.+)(\.weight|\.bias)$", key)
        prefix, part, kind = match.groups() if match else ("", key, "")
        if part == _HF_GATED[0]:
            renamed[f"{prefix}mlp.weights_in{kind}"] = _stack(state, prefix, _HF_GATED, kind)
        elif part != _HF_GATED[1]:
            renamed[prefix + _HF_IN_MEMORY.get(part, part) + kind] = value
    return renamed


def _stack(state: State, prefix: str, parts: tuple[str, ...], kind: str) -> Tensor:
    """Several matrices of one shape as one, row after row."""
    names = [f"{prefix}{part}{kind}" for part in parts]
    missing = [name for name in names if name not in state]
    if missing:
        raise UserError(f"The weights are not complete: {', '.join(missing)} missing.")
    tensors = [state[name] for name in names]
    if len({tensor.shape for tensor in tensors}) > 1 or tensors[0].ndim == 0:
        raise UserError(f"{', '.join(names)} have different shapes: {[tuple(tensor.shape) for tensor in tensors]}.")
    return torch.cat(tensors)


def _from_timm(state: State) -> State:
    official: State = {}
    for key, value in state.items():
        # timm calls the packed SwiGLU matrices fc1 and fc2 as well; only there fc1 is twice as high as fc2 is wide.
        match = re.match(r"(blocks\.\d+\.mlp\.)(fc1|fc2)(\..+)$", key)
        if match and _is_packed(state, match[1]):
            key = match[1] + {"fc1": "w12", "fc2": "w3"}[match[2]] + match[3]
        official["register_tokens" if key == "reg_token" else key] = value
    pos_embed = official.get("pos_embed")
    if "register_tokens" in official and pos_embed is not None and pos_embed.ndim == 3:
        # timm keeps no position for the cls token here: it was added into the token.
        official["pos_embed"] = torch.cat((torch.zeros_like(pos_embed[:, :1]), pos_embed), dim=1)
    return _with_mask_token(official)


def _is_packed(state: State, prefix: str) -> bool:
    first, second = state.get(f"{prefix}fc1.weight"), state.get(f"{prefix}fc2.weight")
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        return False
    return first.shape[0] == 2 * second.shape[1]


def _with_mask_token(state: State) -> State:
    """Zeros, as at the start of training, where a format has no mask token: only masked images would notice."""
    cls_token = state.get("cls_token")
    if "mask_token" not in state and cls_token is not None:
        state["mask_token"] = cls_token.new_zeros(1, cls_token.shape[-1] if cls_token.ndim else 1)
    return state


def _to_huggingface(official: State) -> State:
    """Names of Hugging Face files, which transformers of all versions reads."""
    converted: State = {}
    for key, value in official.items():
        match = re.match(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias|)$", key)
        if match is None:
            stem, dot, kind = key.rpartition(".")
            converted[_HF_TOP.get(key) or (_HF_TOP[stem] + dot + kind if stem in _HF_TOP else key)] = value
            continue
        index, part, kind = match.groups()
        prefix = f"encoder.layer.{index}."
        if part == "attn.qkv":
            for name, matrix in zip(_HF_QKV, value.chunk(3), strict=True):
                converted[prefix + name + kind] = matrix.clone()  # safetensors refuses views of one tensor
        else:
            converted[prefix + _HF_BLOCK.get(part, part) + kind] = value
    return converted


def _to_timm(official: State) -> State:
    state = dict(official)
    mask_token = state.pop("mask_token", None)
    if mask_token is not None and mask_token.any():
        warnings.warn("timm's format has no mask token: it is left out. Only masked images notice.", stacklevel=3)
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return {re.sub(r"(mlp\.)w3\.", r"\1fc2.", re.sub(r"(mlp\.)w12\.", r"\1fc1.", k)): v for k, v in state.items()}


def _some(state: Mapping[str, object]) -> str:
    keys = [str(key) for key in state]
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") or "none"
