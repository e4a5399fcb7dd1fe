"""Which parameters have a memory and which are AdamW's, decided by the modules that own them.

A memory reads a parameter as a matrix that maps an input to an output. Embeddings (tables that are looked up), output
heads (whose rows are classes), norms, biases and free parameters may have a matrix's shape and are none: equalising
their singular values, as Newton-Schulz does, raises no error and trains badly. An optimizer sees tensors only, so the
choice is made here, where the modules are known.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase

Selector = str | nn.Module | type[nn.Module] | nn.Parameter

_HEAD_HOOKS = ("get_output_embeddings", "get_classifier")  # Hugging Face's and timm's
_HEAD_NAME = re.compile(r"(?!conv_)(\w+_)?head|heads|classifier|to_logits")
_EMBEDDING = re.compile(r"Embed(ding)?s?(Bag)?$")  # of a class or one of its bases
_NORM = re.compile(r"Norm(\dd)?$")


class _Place(NamedTuple):
    """One name of a parameter; a tied one has several."""

    name: str
    owner: nn.Module
    attribute: str


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 1e-2,
    adamw: Iterable[Selector] = (),
    memory: Iterable[Selector] = (),
    split: Mapping[str, int] | None = None,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Return groups for an optimizer: `rule="memory"` for hidden matrices, `rule="adamw"` for everything else.

    Every trainable parameter is in exactly one group, under its name; frozen ones are left out. AdamW gets vectors,
    embeddings, norms, output heads and free parameters. Heads are what `get_output_embeddings()` or `get_classifier()`
    returns, a layer that shares its weight with an embedding, and the last layer inside an attribute called `head`,
    `heads`, `*_head`, `classifier` or `to_logits`; where there are none, the last layer of the model is one.

    Args:
        model: the model, bare or in a wrapper that keeps the parameters' shapes (DDP, FSDP2, `torch.compile`).
        weight_decay: of everything but vectors and norms, which have none.
        adamw: what to hand to AdamW nevertheless: parameters, modules, module types, or names. A name matches where
            its dotted parts stand in a row in a parameter's name: "attn.qkv" matches "blocks.0.attn.qkv.weight".
        memory: what to give a memory nevertheless, likewise. Only matrices move.
        split: fused matrices and their number of equal blocks of rows, by name: `{"qkv": 3}`. Each block gets a
            memory of its own. `nn.MultiheadAttention` and torch's recurrent layers are split without being named.
        verbose: print where each parameter went.

    Raises:
        TypeError: if `model` is no module, or `adamw` or `memory` is no list of what they take.
        ValueError: if the model has nothing to train, a name or module matches nothing, two demands on a parameter
            disagree, rows do not divide into their blocks, or `weight_decay` is negative or no number.

    Example:
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 8))
        >>> for group in param_groups(model, weight_decay=0.1):
        ...     print(group["rule"], group["weight_decay"], [name for name, _ in group["params"]])
        memory 0.1 ['1.weight']
        adamw 0.1 ['0.weight', '3.weight']
        adamw 0.0 ['1.bias', '2.weight', '2.bias', '3.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups takes a module, got {type(model).__name__}; pass the model, not its parameters")
    if not weight_decay >= 0.0:  # also refuses NaN
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    places = _places(model)
    trainable = [param for param in places if param.requires_grad]
    if {param for param in model.parameters() if param.requires_grad} != set(trainable):
        raise ValueError("model.parameters() is not what the model's modules own")
    if not trainable:
        raise ValueError("the model has no trainable parameters")
    if any(isinstance(param, nn.UninitializedParameter) for param in trainable):
        raise ValueError("the model has uninitialized parameters; run it on a batch first")
    to_adamw = _selected("adamw", adamw, model, places)
    to_memory = {param for param in _selected("memory", memory, model, places) if param.ndim > 1}
    if both := to_adamw & to_memory:
        raise ValueError(f"adamw and memory both claim {places[both.pop()][0].name!r}")
    blocks = _blocks(split or {}, places)
    heads = _output_layers(model, places)

    groups: dict[tuple[str, float, int], list[tuple[str, nn.Parameter]]] = {}
    for param in trainable:
        kinds = [_kind(param, place, heads) for place in places[param]]
        in_memory = param in to_memory or (param not in to_adamw and all(is_matrix for is_matrix, _ in kinds))
        decay = weight_decay if all(decays for _, decays in kinds) else 0.0
        parts = _checked(blocks.get(param, 1), param, places[param][0]) if in_memory else 1
        groups.setdefault(("memory" if in_memory else "adamw", decay, parts), []).append((places[param][0].name, param))
    result = [
        {"params": groups[key], "rule": key[0], "weight_decay": key[1], "split": key[2]}
        for key in sorted(groups, reverse=True)  # memories first, what does not decay last
    ]
    if result[0]["rule"] == "adamw":
        warnings.warn("no parameter has a memory; are the matrices flattened, as by FSDP1 or ZeRO?", stacklevel=2)
    if verbose:
        print(_table(result))
    return result


def _places(model: nn.Module) -> dict[nn.Parameter, list[_Place]]:
    """Return every parameter with all its names, in the order of `model.parameters()`."""
    places: dict[nn.Parameter, list[_Place]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, param in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            places.setdefault(param, []).append(_Place(name, module, attribute))
    return places


def _kind(param: nn.Parameter, place: _Place, heads: set[nn.Module]) -> tuple[bool, bool]:
    """Return whether the parameter is a hidden matrix in this place, and whether weight decay is for it."""
    _, owner, attribute = place
    if param.ndim < 2 or _is_a(owner, _NORM):
        return False, False
    if owner in heads:
        return False, True
    several = isinstance(owner, (nn.MultiheadAttention, RNNBase, RNNCellBase)) and "weight" in attribute
    if (attribute == "weight" or several) and not _is_a(owner, _EMBEDDING):
        return True, True
    return False, sum(size > 1 for size in param.shape) > 1  # a class token [1, 1, D] is a vector


def _is_a(module: nn.Module, kind: re.Pattern[str]) -> bool:
    """Return whether a class of the module is named like `kind`; a PatchEmbedding that is a convolution is not."""
    return not isinstance(module, (nn.Linear, _ConvNd)) and any(kind.search(cls.__name__) for cls in type(module).mro())


def _output_layers(model: nn.Module, places: Mapping[nn.Parameter, list[_Place]]) -> set[nn.Module]:
    """Return the modules whose matrices are output heads; `param_groups` says how they are found."""
    heads: set[nn.Module] = set()
    for module in model.modules():
        for hook in _HEAD_HOOKS:
            answer = method() if callable(method := getattr(module, hook, None)) else None
            for head in answer if isinstance(answer, tuple) else (answer,):
                heads.update(head.modules() if isinstance(head, nn.Module) else ())
    for tied in places.values():
        if any(_is_a(place.owner, _EMBEDDING) for place in tied):
            heads.update(place.owner for place in tied if not _is_a(place.owner, _EMBEDDING))
    # numbered modules are the repeated blocks of a model, whose attributes may be called anything
    named = [
        (name.count("."), layers[-1])
        for name, module in model.named_modules()
        if _HEAD_NAME.fullmatch(name.rpartition(".")[2])
        and not re.search(r"\b\d", name)
        and (layers := _layers(module))
    ]
    outermost = min((depth for depth, _ in named), default=0)
    heads.update(layer for depth, layer in named if depth == outermost)
    return heads or set(_layers(model)[-1:])


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the modules inside that apply a matrix called weight, in the order of their registration."""
    return [
        layer
        for layer in module.modules()
        if isinstance(weight := getattr(layer, "weight", None), Tensor)
        and weight.ndim > 1
        and not (_is_a(layer, _EMBEDDING) or _is_a(layer, _NORM))
    ]


def _selected(
    argument: str, selectors: Iterable[Selector], model: nn.Module, places: Mapping[nn.Parameter, list[_Place]]
) -> set[nn.Parameter]:
    """Return the parameters that an `adamw` or `memory` argument covers."""
    if isinstance(selectors, (str, nn.Module, Tensor, type)):
        raise TypeError(f"{argument} takes a list of names, modules, module types or parameters, got {selectors!r}")
    selected: set[nn.Parameter] = set()
    for selector in selectors:
        if isinstance(selector, str):
            found = _named(argument, selector, places)
        elif isinstance(selector, nn.Parameter):
            found = {selector}
        elif isinstance(selector, nn.Module):
            found = set(selector.parameters())
        elif isinstance(selector, type) and issubclass(selector, nn.Module):
            found = {param for owner in model.modules() if isinstance(owner, selector) for param in owner.parameters()}
        else:
            raise TypeError(f"{argument} takes names, modules, module types or parameters, got {selector!r}")
        if not found & places.keys():
            raise ValueError(f"{argument}: the model has no parameter in {selector!r}")
        selected |= found
    return selected


def _named(argument: str, key: str, places: Mapping[nn.Parameter, list[_Place]]) -> set[nn.Parameter]:
    """Return the parameters in whose names the dotted parts of `key` stand in a row."""
    size = key.count(".") + 1
    found: dict[str, set[nn.Parameter]] = {}
    for param, names in places.items():
        for parts in (place.name.split(".") for place in names):
            for start in range(len(parts) - size + 1):
                found.setdefault(".".join(parts[start : start + size]), set()).add(param)
    if key not in found:
        near = get_close_matches(key, found)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{argument}: no parameter's name contains {key!r}{hint}")
    return found[key]


def _blocks(split: Mapping[str, int], places: Mapping[nn.Parameter, list[_Place]]) -> dict[nn.Parameter, int]:
    """Return the number of blocks of rows of fused parameters: what `split` says, else what torch's modules fuse."""
    blocks: dict[nn.Parameter, int] = {}
    for key, parts in split.items():
        if not isinstance(parts, int) or parts < 1:
            raise ValueError(f"split: {key!r} needs a number of blocks of at least 1, got {parts!r}")
        for param in _named("split", key, places):
            if blocks.setdefault(param, parts) != parts:
                raise ValueError(f"split: {places[param][0].name!r} is asked for {blocks[param]} and {parts} blocks")
    for param, ((_, owner, attribute), *_) in places.items():
        if isinstance(owner, nn.MultiheadAttention) and attribute == "in_proj_weight":
            blocks.setdefault(param, 3)
        elif isinstance(owner, (RNNBase, RNNCellBase)) and attribute.startswith(("weight_ih", "weight_hh")):
            blocks.setdefault(param, len(param) // owner.hidden_size)  # the gates
    return blocks


def _checked(parts: int, param: nn.Parameter, place: _Place) -> int:
    """Return `parts` if the matrix has that many equal blocks of rows."""
    if len(param) % parts:
        raise ValueError(f"split: {place.name!r} has {len(param)} rows, which are not {parts} equal blocks")
    if parts > 1 and type(place.owner).__name__ == "Conv1D":  # Hugging Face's, in GPT-2
        raise ValueError(f"split: {place.name!r} is stored as [inputs, outputs], so that its blocks are columns")
    return parts


def _table(groups: list[dict[str, Any]]) -> str:
    """Return where every parameter went, a line each, and the totals."""
    lines = [("name", "shape", "rule", "weight_decay", "split", f"{'parameters':>15}")]
    for group in groups:
        rest = (group["rule"], f"{group['weight_decay']:g}", str(group["split"]))
        lines += [(name, str(list(param.shape)), *rest, f"{param.numel():15,}") for name, param in group["params"]]
    for rule in ("memory", "adamw"):
        sizes = [param.numel() for group in groups if group["rule"] == rule for _, param in group["params"]]
        lines.append((f"total of {len(sizes)}", "", rule, "", "", f"{sum(sizes):15,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
