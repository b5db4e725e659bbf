"""`load_backbone`: a backbone by name, with weights from wherever they are; and writing them back."""

import copy
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dense_heads.backbones.base import Backbone
from dense_heads.backbones.channels import adapt_channels
from dense_heads.backbones.download import fetch
from dense_heads.backbones.formats import FORMATS, State, convert, huggingface_config
from dense_heads.backbones.pixels import WITHOUT_NETWORK, Pixels
from dense_heads.backbones.streamed import stream
from dense_heads.backbones.vit import VisionTransformer
from dense_heads.backbones.zoo import BACKBONES, BackboneSpec, get_spec
from dense_heads.errors import UserError, unknown_name

IN_HOUSE = Path(__file__).parent / "weights"
FOLDER_FILES = ("backbone.safetensors", "model.safetensors")  # a finished run of ours; a Hugging Face folder
_SOURCES = "'official', 'in-house', None (random), hf:OWNER/REPOSITORY, or the path of a file or folder"


def load_backbone(
    name: str,
    weights: str | Path | None = "official",
    seed: int = 0,
    patch_fit: str = "crop",
    in_channels: int = 3,
    channel_weights: str = "mean",
    drop_path: float = 0.0,
    checkpointing: bool = False,
    streamed: bool = False,
) -> Backbone:
    """A backbone in eval mode, float32, on the CPU.

    Args:
        name: an entry of `zoo.py`, with or without the prefix `dinov2_`.
        weights: `"official"` (downloaded on first use), `"in-house"`, None (random), `"hf:OWNER/REPOSITORY"`, or the
            path of a file or folder: official `.pth`, official training checkpoint, Hugging Face, timm, or our own,
            told apart by their keys.
        seed: of random weights; the global generator is not touched.
        patch_fit: what happens to images that are no multiple of the patch: a policy of `ops/pad.py`.
        in_channels: channels of the images; weights made for another number are adapted, random ones made for it.
        channel_weights: how they are adapted: `mean` or `sum` (`backbones/channels.py`).
        drop_path: rate of stochastic depth, where it is trained.
        checkpointing: saves memory where it is trained, by computing activations twice.
        streamed: the blocks' weights in bfloat16, one block at a time widened to compute (`backbones/streamed.py`);
            random ones are never there in float32, and their fingerprint is that of the rounded ones.

    Raises:
        UserError: unknown name, weights that are not there, not readable, or not those of this backbone.
    """
    spec = get_spec(name)
    if spec.name in WITHOUT_NETWORK:
        if weights not in (None, "official"):
            raise UserError(f"Got weights {str(weights)!r}; a baseline without a network has none. Leave them out.")
        return Pixels(spec, in_channels, patch_fit).eval()
    options: dict[str, Any] = {"patch_fit": patch_fit, "in_channels": in_channels, "drop_path": drop_path}
    options["block_dtype"] = torch.bfloat16 if streamed else torch.float32
    if weights is None:
        vit = _build(spec, seed=seed, checkpointing=checkpointing, **options)
        return (stream(vit) if streamed else vit).eval()
    path = _locate(spec, weights)
    state = adapt_channels(read_weights(path), in_channels, channel_weights)
    grid_size = _grid_size(state, path)
    vit = _build(spec, grid_size=grid_size, seed=None, checkpointing=checkpointing, **options)
    _check_state(state, vit.state_dict(), spec, path)
    vit.load_state_dict(state, strict=True)
    if streamed:
        vit.remember_fingerprint_of({key: tensor.float() for key, tensor in state.items()})
        stream(vit)
    return vit.eval()


def read_weights(path: str | Path) -> State:
    """The weights in a file (or in a folder's weights file) under the official keys, whatever format it is in.

    Raises:
        UserError: no such file; truncated, corrupt, or a pickle that wants to run code; not a DINOv2 backbone.
    """
    path = find_weights_file(path)
    try:
        return convert(_read(path), to="official")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def save_backbone(
    backbone: Backbone, path: str | Path, format: str = "own", dtype: torch.dtype = torch.float32
) -> Path:
    """Writes the weights, atomically, and returns the file.

    Args:
        backbone: what to write.
        path: a file; for `huggingface` the folder, which also gets the config.json that `from_pretrained` needs.
        format: `own` (safetensors, official keys), `official` (.pth), `huggingface`, `timm` (safetensors).
        dtype: of the file; bfloat16 halves it. Whatever it is, weights are float32 again when they are loaded.

    Raises:
        UserError: unknown format, a backbone without weights, or a path that cannot be written.
    """
    if format not in FORMATS:
        raise unknown_name("weights format", str(format), FORMATS)
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"{backbone.name} has no weights that could be written. Expected a ViT.")
    if dtype != torch.float32:
        backbone = copy.deepcopy(backbone).to(dtype).float()  # what will be loaded, so that the fingerprint is its own
    converted = convert(backbone.state_dict(), format)
    state = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in converted.items()}
    path = Path(path)
    file = path / "model.safetensors" if format == "huggingface" else path
    metadata = {"format": "pt"}
    if format == "own":
        metadata |= {"backbone": backbone.name, "fingerprint": backbone.fingerprint()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if format == "official":
            _write(file, lambda temporary: torch.save(state, temporary))
        else:
            _write(file, lambda temporary: save_file(state, temporary, metadata))
        if format == "huggingface":
            config = json.dumps(huggingface_config(backbone), indent=2) + "\n"
            _write(path / "config.json", lambda temporary: temporary.write_text(config))
    except OSError as error:
        raise UserError(f"Cannot write {file}: {error}.") from error
    return file


def find_weights_file(path: str | Path) -> Path:
    """`path`, or the weights file in it if it is a folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return path / name
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UserError(f"No weights in the folder {path}: expected {' or '.join(FOLDER_FILES)}, found {found}.")
    if not path.is_file():
        raise UserError(f"No weights at {path}: there is no such file. Weights are {_SOURCES}.")
    return path


def _build(
    spec: BackboneSpec,
    *,
    grid_size: int | None = None,
    seed: int | None = None,
    checkpointing: bool = False,
    **options: Any,
) -> VisionTransformer:
    return VisionTransformer(
        spec.embed_dim,
        spec.num_blocks,
        spec.num_heads,
        num_registers=spec.num_registers,
        ffn=spec.ffn,
        name=spec.name,
        patch_size=spec.patch_size,
        grid_size=grid_size or spec.grid_size,
        interpolate_antialias=spec.interpolate_antialias,
        interpolate_offset=spec.interpolate_offset,
        checkpointing=checkpointing,
        seed=seed,
        **options,
    )


def _locate(spec: BackboneSpec, weights: str | Path) -> Path:
    """Where the weights are on this machine, after a download if need be."""
    if not isinstance(weights, str | Path):
        raise UserError(f"Got weights {weights!r}; expected {_SOURCES}.")
    if weights == "official":
        if spec.official:
            return fetch(spec.official_url, spec.official_file)
        official = ", ".join(name for name, entry in BACKBONES.items() if entry.official)
        raise UserError(
            f"There are no official weights for {spec.name}, a size of this project's own. Use weights='in-house', "
            f"weights=None (random), or one of {official}."
        )
    if weights == "in-house":
        path = IN_HOUSE / f"{spec.name}.safetensors"
        if path.is_file():
            return path
        there = ", ".join(sorted(file.stem for file in IN_HOUSE.glob("*.safetensors"))) or "none yet"
        instead = "weights='official', a path" if spec.official else "a path"
        raise UserError(
            f"The project has no weights of its own for {spec.name} (it has: {there}). Use {instead}, or weights=None "
            "(random)."
        )
    if isinstance(weights, str) and weights.startswith("hf:"):
        return _from_hub(weights.removeprefix("hf:"), spec)
    path = find_weights_file(weights)
    _check_hf_config(path.parent / "config.json", spec)
    return path


def _from_hub(repository: str, spec: BackboneSpec) -> Path:
    """`model.safetensors` of a Hugging Face repository, through its own cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"Got the Hugging Face repository {repository!r}; expected hf:OWNER/REPOSITORY.")
    try:
        config = Path(huggingface_hub.hf_hub_download(repository, "config.json"))
        path = Path(huggingface_hub.hf_hub_download(repository, "model.safetensors"))
    # No network and not in the cache, or refused by the server.
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"Cannot get {repository} from huggingface.co: {str(error).strip().splitlines()[0]} By hand: fetch "
            f"https://huggingface.co/{repository}/resolve/main/model.safetensors and give its path as weights."
        ) from error
    _check_hf_config(config, spec)
    return path


def _check_hf_config(path: Path, spec: BackboneSpec) -> None:
    """The number of heads: the one thing that no shape of a tensor tells."""
    try:
        heads = json.loads(path.read_text()).get("num_attention_heads", spec.num_heads)
    except (OSError, ValueError, AttributeError):
        return
    if heads != spec.num_heads:
        raise UserError(f"{path} says num_attention_heads {heads}; {spec.name} has {spec.num_heads}.")


def _read(path: Path) -> Mapping[str, object]:
    """The content of a file, told by its first bytes and not by its name. Never runs code."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}).") from error
    if len(start) < 9:
        raise UserError(f"the file has {len(start)} bytes. It was cut short; copy or download it again.")
    try:
        if start[8:] == b"{":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"not readable as safetensors ({error}). It is damaged or cut short; get it again.") from error
    # Unpickling hostile or damaged bytes fails in any way it likes; whatever it was, the file is what is wrong.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"not readable as weights ({reason}). Either it is damaged or cut short, or it holds more than tensors "
            "and plain values, which is refused because such files can run code. Get it again, or save the tensors "
            "as safetensors where you trust the file."
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}; expected a state dict (names and tensors).")
    return content


def _grid_size(state: State, path: Path) -> int:
    """Side of the positional embedding's grid: 37 in official files, 16 after training at 224 pixels."""
    table = state.get("pos_embed")
    shape = () if table is None else tuple(table.shape)
    side = math.isqrt(shape[1] - 1) if len(shape) == 3 and shape[1] > 1 else 0
    if table is None or side == 0 or side**2 + 1 != shape[1]:
        got = "no pos_embed" if table is None else f"pos_embed of shape {shape}"
        raise UserError(f"{path}: got {got}; expected (1, 1 + n*n, D), the cls token and a square grid of patches.")
    return side


def _check_state(state: State, expected: State, spec: BackboneSpec, path: Path) -> None:
    """Strict: the same keys, the same shapes, finite numbers."""
    problems = []
    for title, these, others in (("missing", expected, state), ("unexpected", state, expected)):
        keys = [key for key in these if key not in others]
        if keys:
            problems.append(f"{title}: {_list(keys)}")
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if shapes:
        problems.append(f"other shapes: {_list(shapes)}")
    if problems:
        raise UserError(
            f"{path} does not fit {spec.name}: {'; '.join(problems)}. {_looks_like(state, spec)} "
            "Keys are given by their official names."
        )
    broken = [key for key, tensor in state.items() if not tensor.float().isfinite().all()]
    if broken:
        raise UserError(f"{path}: NaN or infinity in {_list(broken)}. The weights are broken; use another checkpoint.")


def _looks_like(state: State, wanted: BackboneSpec) -> str:
    """Which backbone of the zoo has these sizes, in a sentence."""
    cls_token, registers = state.get("cls_token"), state.get("register_tokens")
    indices = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d{1,4})\.", key))]
    if cls_token is None or cls_token.ndim != 3 or not indices:
        return "It looks like no backbone at all."
    width, depth = cls_token.shape[-1], max(indices) + 1
    num_registers = registers.shape[1] if registers is not None and registers.ndim == 3 else 0
    ffn = "swiglu" if any(".mlp.w12." in key for key in state) else "mlp"
    sizes = (width, depth, num_registers, ffn)
    for spec in BACKBONES.values():
        if (spec.embed_dim, spec.num_blocks, spec.num_registers, spec.ffn) == sizes:
            if spec is wanted:
                return f"It looks like {spec.name}, but damaged or changed (other channels: in_channels=...)."
            return f"It looks like {spec.name}: use backbone={spec.name}."
    return f"It looks like none of the backbones here: width {width}, {depth} blocks, {num_registers} registers, {ffn}."


def _list(items: list[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Through a temporary file in the same folder: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
