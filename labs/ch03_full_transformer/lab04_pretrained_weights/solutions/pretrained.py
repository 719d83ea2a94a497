"""GPT-2's weights in lab 3.3's model, and the search for the layer that is wrong.

Sources: the description of the file format in the repository of Hugging Face's `safetensors` (release 0.8);
`configuration_gpt2.py` and `modeling_gpt2.py` of Hugging Face transformers (5.16) for names and defaults;
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2).

Shapes: B sequences, T tokens, L = num_layers blocks.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shared.earlier import solution_of
from torch import Tensor, nn

GPT, GPTConfig = solution_of("ch03/lab03").GPT, solution_of("ch03/lab03").GPTConfig
# Hugging Face's name of each module of a block, and ours: "attn.c_attn" -> "attention.qkv_proj" and five more.
GPT2_NAMES = solution_of("ch02/lab04").GPT2_NAMES

# --- Part 1: the file -------------------------------------------------------------------------

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file.

    Attributes:
        dtype: of its numbers, which are little-endian, the last axis running fastest.
        shape: its sizes; () for a single number.
        begin: where its first byte is, counted from the start of the *file*.
        end: where its last byte is, plus 1.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`. Given.

    Raises:
        ValueError: it is no UTF-8, no JSON, or no object.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"this JSON is a {type(value).__name__}, not an object")
    return value


def parse_entry(name: str, value: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Return dtype, shape and the two offsets of one tensor, from its value in the header. Given.

    Whether the offsets fit the shape, or the file, is not looked at.

    Raises:
        ValueError: something lacks, is of the wrong kind, negative or absurdly large, or the dtype is none of DTYPES.
    """
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} needs a dtype, a shape and two data_offsets, not {value!r:.200}") from error
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{name}: sizes and offsets are whole numbers from 0, not {value!r:.200}")
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise ValueError(f"{name}: no tensor has the shape {shape!r:.200}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has the dtype {dtype!r:.50}; known are {', '.join(DTYPES)}")
    return DTYPES[dtype], tuple(shape), begin, end


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return what a safetensors file says about its tensors, without reading any of them.

    The file: 8 bytes, the length N of the header as an unsigned little-endian integer; N bytes of JSON; the
    numbers. The JSON gives for each name {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]},
    the offsets counted from the end of the header. The tensors lie one behind the other, in any order,
    without gap or overlap, and fill the rest of the file. "__metadata__" is no tensor, but strings by name.

    A file may be damaged, or made to do damage: nothing is read or allocated because the file says so
    before it is known to fit. The header may end anywhere; tensors need not be aligned.

    Args:
        path: the file.

    Returns:
        The entries by name, and the metadata, {} if there is none.

    Raises:
        ValueError: the file is shorter than 8 bytes or than its header; the header is no JSON object; an entry is
            malformed (`parse_entry`); a tensor's bytes are not as many as its shape and dtype need; the
            tensors overlap, leave a gap, or do not end where the file ends; the metadata is no
            object of strings. The message begins with the path.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > size:
                raise ValueError(f"the header should end at byte {start:,}, and the file at {size:,}")
            header = parse_json(file.read(start - 8))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ is no object of strings")
        entries = {}
        for name, value in header.items():
            dtype, shape, begin, end = parse_entry(name, value)
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {end - begin:,} bytes, too many or too few for {shape} {dtype}")
            entries[name] = Entry(dtype, shape, start + begin, start + end)
        at = start
        # In the order of the bytes, each must begin where the one before ended. An empty tensor has no bytes.
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != at:
                raise ValueError(f"{name} should begin at byte {at:,} of the file, not at {entry.begin:,}")
            at = entry.end
        if at != size:
            raise ValueError(f"the tensors end at byte {at:,}, and the file at {size:,}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return entries, metadata


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, by name.

    Args:
        path: the file.

    Returns:
        Tensors on the CPU in the file's dtypes, contiguous. They may be written to: the file does not change.

    Raises:
        ValueError: as `read_header`.
    """
    entries, _ = read_header(path)
    tensors = {}
    with path.open("rb") as file:
        for name, entry in entries.items():
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            file.seek(entry.begin)
            # As bytes, since NumPy has no bfloat16; read straight into the tensor's own memory.
            file.readinto(tensor.view(-1).view(torch.uint8).numpy())
            tensors[name] = tensor
    return tensors


def load_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, which is one file or several.

    One file is called model.safetensors. If there is no such file, model.safetensors.index.json holds
    {"weight_map": {tensor: file}} and says in which file, a *shard*, each tensor is.

    Args:
        folder: where the files are.

    Returns:
        The tensors by name: those of the file, or exactly those that the index names.

    Raises:
        FileNotFoundError: there is neither the one file nor the index.
        ValueError: the index is no JSON object or has no object `weight_map`; a shard is not a plain file name
            but leads to another folder, is not there, or lacks a tensor that the index finds in it; or as
            `read_header`.
    """
    if (whole := folder / "model.safetensors").is_file():
        return load_tensors(whole)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor {index.name}")
    places = parse_json(index.read_bytes()).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index} has no weight_map")
    shards: dict[str, dict[str, Tensor]] = {}
    tensors = {}
    for name, shard in places.items():
        # A name with a slash, or "..", would let the index read any file of this machine.
        if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
            raise ValueError(f"{index}: there is no file {shard!r} beside it")
        if shard not in shards:  # each is read once
            shards[shard] = load_tensors(folder / shard)
        if name not in shards[shard]:
            raise ValueError(f"{index} finds {name} in {shard}, where it is not")
        tensors[name] = shards[shard][name]
    return tensors


# --- Part 2: the configuration ----------------------------------------------------------------

# What a config.json that leaves a key out means by that (GPT2Config's defaults).
DEFAULTS = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

# What our model computes. A config that wants anything else describes another function.
ONLY = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the GELU by tanh
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def config_from_json(path: Path) -> GPTConfig:
    """Return our configuration for Hugging Face's.

    | theirs | ours |
    |---|---|
    | vocab_size, n_layer, n_head, n_embd | vocab_size, num_layers, num_heads, d_model |
    | n_positions; if that is not there, n_ctx, its old name | context |
    | n_inner | d_ff |
    | layer_norm_epsilon | eps |
    | tie_word_embeddings | tied |
    | embd_pdrop, attn_pdrop, resid_pdrop, which must agree | dropout |

    A key that is not in the file has its value in DEFAULTS. Keys that are not in DEFAULTS are ignored.

    Args:
        path: a config.json.

    Raises:
        ValueError: the file is no JSON object; or it wants what our model does not compute (ONLY), or three
            different dropouts. The message names the key.
    """
    found = parse_json(path.read_bytes())
    if "n_positions" not in found and "n_ctx" in found:
        found["n_positions"] = found["n_ctx"]
    theirs = DEFAULTS | found
    for key, allowed in ONLY.items():
        if theirs[key] not in allowed:
            raise ValueError(f"{path}: {key} is {theirs[key]!r}, and our model only computes {allowed}")
    dropout = theirs["embd_pdrop"]
    if not dropout == theirs["attn_pdrop"] == theirs["resid_pdrop"]:
        raise ValueError(
            f"{path}: embd_pdrop, attn_pdrop and resid_pdrop differ, and our model has one dropout"
        )
    return GPTConfig(
        vocab_size=theirs["vocab_size"],
        context=theirs["n_positions"],
        num_layers=theirs["n_layer"],
        num_heads=theirs["n_head"],
        d_model=theirs["n_embd"],
        d_ff=theirs["n_inner"],
        dropout=dropout,
        eps=theirs["layer_norm_epsilon"],
        tied=theirs["tie_word_embeddings"],
    )


# --- Part 3: the names ------------------------------------------------------------------------


def layer_names(num_layers: int) -> dict[str, str]:
    """Return Hugging Face's name of every module that holds parameters, and ours, as the tokens meet them.

    That is "wte": "token_embedding"; "wpe": "position_embedding"; for each block, from 0, the six of
    GPT2_NAMES, such as "h.0.ln_1": "blocks.0.norm1"; "ln_f": "final_norm"; and "lm_head": "head".

    Args:
        num_layers: L.

    Returns:
        6 L + 4 names, in this order.
    """
    names = {"wte": "token_embedding", "wpe": "position_embedding"}
    for i in range(num_layers):
        names |= {f"h.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in GPT2_NAMES.items()}
    return names | {"ln_f": "final_norm", "lm_head": "head"}


def expected_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the state dict of a GPT of this configuration. Given.

    The model is made on the device `meta`, where tensors have shapes and no numbers.
    """
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}


def map_names(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Return the state dict of our GPT, made from the tensors of a GPT-2 checkpoint.

    A checkpoint has the names of `layer_names`, each with ".weight" or ".bias" behind it. Its style is one of two:
    "transformer." before every name but "lm_head.weight", or before none. The weights of
    the four Conv1D modules of a block are (in, out), as in lab 2.4; ours are (out, in).

    Two constants of old checkpoints are ignored, "h.0.attn.bias" and "h.0.attn.masked_bias" of every block.
    If `config.tied`, "lm_head.weight" may be absent; if it is there, it must equal the token embedding.

    Args:
        state: the checkpoint's tensors by name. Neither the mapping nor a tensor is modified.
        config: of the model.

    Returns:
        A tensor for every name in `expected_shapes(config)` and no other, in the checkpoint's dtype. They may share
        memory with those of `state`.

    Raises:
        ValueError: tensors are missing, unknown, or of a shape that does not fit (after transposing),
            or a tied "lm_head.weight" is not the token embedding. The message names all of them as the
            checkpoint does; "transformer." may be left out.
    """
    expected, names = expected_shapes(config), layer_names(config.num_layers)
    prefix = "transformer." if any(name.startswith("transformer.") for name in state) else ""
    unknown = dict.fromkeys(state)
    for i in range(config.num_layers):
        for constant in ("attn.bias", "attn.masked_bias"):
            unknown.pop(f"{prefix}h.{i}.{constant}", None)
    renamed, problems = {}, []
    for module, our_module in names.items():
        for kind in ("weight", "bias"):
            ours = f"{our_module}.{kind}"
            theirs = f"{'' if module == 'lm_head' else prefix}{module}.{kind}"
            if ours not in expected:  # embeddings and head have no bias
                continue
            if theirs not in state:
                if not (module == "lm_head" and config.tied):
                    problems.append(f"{theirs} is missing")
                continue
            del unknown[theirs]
            tensor = state[theirs]
            if tensor.dim() == 2 and module.split(".")[-1] in ("c_attn", "c_proj", "c_fc"):
                tensor = tensor.T
            if tuple(tensor.shape) != expected[ours]:
                problems.append(f"{theirs} has the shape {tuple(state[theirs].shape)}")
            renamed[ours] = tensor
    problems += [f"{name} is unknown" for name in unknown]
    if config.tied and "token_embedding.weight" in renamed:
        embedding = renamed["token_embedding.weight"]
        if not torch.equal(renamed.setdefault("head.weight", embedding), embedding):
            problems.append("lm_head.weight is not the token embedding, although they are tied")
        renamed["head.weight"] = embedding
    if problems:
        raise ValueError(f"the checkpoint does not fit the configuration: {'; '.join(problems)}")
    return renamed


def load_gpt2(folder: Path, *, dtype: torch.dtype = torch.float32) -> GPT:
    """Return our GPT with the configuration and the weights of a GPT-2 checkpoint.

    Args:
        folder: with config.json and the checkpoint, as Hugging Face's `save_pretrained` writes them.
        dtype: of every parameter. Each number of the checkpoint is converted to it once, directly.

    Returns:
        The model, in evaluation mode, trainable. If tied, its head's weight *is* its token embedding's.

    Raises:
        FileNotFoundError: config.json or the checkpoint is not there.
        ValueError: as `load_checkpoint`, `config_from_json` and `map_names`.
    """
    config = config_from_json(folder / "config.json")
    model = GPT(config).to(dtype)  # before the weights come, or float64 would pass through float32
    model.load_state_dict(map_names(load_checkpoint(folder), config))
    return model.eval()


# --- Part 4: which layer is wrong? ------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a layer, as it was observed.

    Attributes:
        name: the layer's.
        given: its first positional argument, as it was when the call began.
        returned: its result (`first_of`), as it was when the call ended.
    """

    name: str
    given: Tensor
    returned: Tensor


@dataclass(frozen=True)
class Divergence:
    """A layer at which two models differ.

    Attributes:
        index: its place in what was compared.
        name: the layer's.
        error: by how much, as `disagreement` says.
    """

    index: int
    name: str
    error: float


def first_of(result: Any) -> Tensor:
    """Return what a layer returned, or the first of it, if that is a tuple. Given."""
    return result[0] if isinstance(result, tuple) else result


def record(model: nn.Module, paths: Mapping[str, str], ids: Tensor) -> list[Call]:
    """Run `model(ids)` and return every call of the layers in `paths`, in the order in which they end.

    The model computes what it always does, in the mode it is in, without gradients. Afterwards, also when it
    raises, it has no hook that it did not have before.

    Args:
        model: any module.
        paths: what to call a layer, and its path in the model as in `named_modules()`. The layers are called with
            a tensor first and return a tensor or a tuple that starts with one. Other layers may do as they please.
        ids: what the model is called with.

    Returns:
        The calls. Their tensors are copies: nothing that the model does later changes them.
    """
    calls: list[Call] = []
    begun: dict[str, list[Tensor]] = {name: [] for name in paths}
    handles = []

    def observe(name: str, layer: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            begun[name].append(args[0].detach().clone())

        def after(_: nn.Module, args: tuple[Tensor, ...], result: Any) -> None:
            calls.append(Call(name, begun[name].pop(), first_of(result).detach().clone()))

        handles.extend((layer.register_forward_pre_hook(before), layer.register_forward_hook(after)))

    try:
        for name, path in paths.items():
            observe(name, model.get_submodule(path))
        with torch.no_grad():
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def disagreement(ours: Tensor, theirs: Tensor, *, atol: float, rtol: float = 0.0) -> float | None:
    """Return by how much two tensors differ, or None if they agree.

    They agree if they have one shape and |ours - theirs| <= atol + rtol * |theirs| holds for every element, computed
    in float64 whatever their dtypes are. Equal infinities agree. A NaN agrees with nothing, not even with a NaN.

    Args:
        ours: any shape, also without elements.
        theirs: the reference.
        atol: absolute tolerance.
        rtol: tolerance relative to the reference.

    Returns:
        None; or the largest |ours - theirs| of all elements; or infinity, if the shapes differ,
        or there is a NaN, or an infinity that is not matched.
    """
    if ours.shape != theirs.shape:
        return math.inf
    a, b = ours.double(), theirs.double()
    error = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    allowed = atol + rtol * torch.where(b.isfinite(), b.abs(), 0.0)
    return float(error.max()) if (error > allowed).any() else None


def first_divergence(
    ours: Sequence[tuple[str, Tensor]],
    theirs: Sequence[tuple[str, Tensor]],
    *,
    atol: float,
    rtol: float = 0.0,
) -> Divergence | None:
    """Return the first place at which two runs disagree, or None.

    Args:
        ours: names and values in the order of execution.
        theirs: the same of the reference, under the same names.
        atol: as in `disagreement`.
        rtol: as in `disagreement`.

    Raises:
        ValueError: the names are not the same, one by one.
    """
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        raise ValueError("two runs with different layers cannot be compared")
    for index, ((name, a), (_, b)) in enumerate(zip(ours, theirs, strict=True)):
        error = disagreement(a, b, atol=atol, rtol=rtol)
        if error is not None:
            return Divergence(index, name, error)
    return None


def locate_faults(
    model: nn.Module, reference: Sequence[Call], *, atol: float, rtol: float = 0.0
) -> list[Divergence]:
    """Return every layer of `model` that computes something else than the reference's from the same input.

    Each layer is handed the input that the *reference's* layer had. So an error made before does not count
    against it, nor one that cancels.

    Args:
        model: ours, in evaluation mode.
        reference: calls of the reference's layers, named by the paths of ours. They are not modified.
        atol: as in `disagreement`.
        rtol: as in `disagreement`.

    Returns:
        One for each call whose results disagree, in the order of `reference`. A layer's result is
        `first_of` what it returns.
    """
    faults = []
    for index, call in enumerate(reference):
        with torch.no_grad():
            result = model.get_submodule(call.name)(call.given.clone())
        error = disagreement(first_of(result), call.returned, atol=atol, rtol=rtol)
        if error is not None:
            faults.append(Divergence(index, call.name, error))
    return faults


def compare_models(
    ours: GPT, theirs: nn.Module, ids: Tensor, *, atol: float, rtol: float = 0.0
) -> tuple[Divergence | None, list[Divergence]]:
    """Return where the stream of ours first leaves that of Hugging Face's, and all layers at fault. Given.

    Args:
        ours: our model, in evaluation mode.
        theirs: a GPT2LMHeadModel, in evaluation mode.
        ids: (B, T), int64.
        atol: as in `disagreement`.
        rtol: as in `disagreement`.

    Returns:
        The first divergence among the input of block 0, called "embeddings", and the outputs of all blocks, the last
        norm and the head; and what `locate_faults` finds among all layers, whole blocks too. If the stream diverges
        and no layer is at fault, the wiring between the layers is.
    """
    L = len(ours.blocks)
    paths = {our: f"transformer.{their}" for their, our in layer_names(L).items() if their != "lm_head"}
    for i in range(L):
        paths |= {f"blocks.{i}": f"transformer.h.{i}", f"blocks.{i}.attention": f"transformer.h.{i}.attn"}
        paths[f"blocks.{i}.feed_forward"] = f"transformer.h.{i}.mlp"
    paths["head"] = "lm_head"
    coarse = [*(f"blocks.{i}" for i in range(L)), "final_norm", "head"]

    def stream(model: nn.Module, where: Mapping[str, str]) -> list[tuple[str, Tensor]]:
        calls = record(model, where, ids)
        return [("embeddings", calls[0].given), *((call.name, call.returned) for call in calls)]

    mine = stream(ours, {name: name for name in coarse})
    reference = stream(theirs, {name: paths[name] for name in coarse})
    first = first_divergence(mine, reference, atol=atol, rtol=rtol)
    return first, locate_faults(ours, record(theirs, paths, ids), atol=atol, rtol=rtol)
