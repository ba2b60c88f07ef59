"""The tensors of a directory in Hugging Face's layout, known without reading them: of one file, or of shards."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from pygen import _C
from pygen.files import CheckpointError, open_regular, refuse
from pygen.files.stored_tensor import StoredTensor, parsed

MAX_JSON = 1 << 24  # bytes of config.json, and of an index: what is parsed from it takes many times more


def stored_tensors(weights: Path, index: Path) -> dict[str, StoredTensor]:
    """Those of the file ``weights`` where there is one, else of the shards that ``index`` names."""
    if weights.exists():
        tensors, _, _ = parsed(weights, _C.parse_safetensors)
        return tensors
    return _parse_shards(index)


def _parse_shards(index: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards: those of the index, each in its own file, and no others."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        refuse(index, "weight_map must be an object of tensors and the files that hold them")
    for name, shard in weight_map.items():
        # A plain name: a path would lead out of the directory. (A link may: caches of downloads are made of them.)
        plain = isinstance(shard, str) and Path(shard).name == shard and len(shard) < 256
        if not plain or not shard.endswith(".safetensors"):
            refuse(index, f"weight_map: the file of {name!r:.100} must be a name in this directory, got {shard!r:.100}")
    tensors: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        file = index.with_name(shard)
        found, _, _ = parsed(file, _C.parse_safetensors)
        for name, tensor in found.items():
            if weight_map.get(name) != shard:
                refuse(file, f"unknown tensor {name!r}: it is not in {index.name}, or there in another file")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            refuse(index.with_name(shard), f"missing tensor {name!r:.100}, which {index.name} promises")
    return {name: tensors[name] for name in weight_map}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, no field twice."""
    with open_regular(file) as stream:
        if os.fstat(stream.fileno()).st_size > MAX_JSON:
            refuse(file, f"more than {MAX_JSON} bytes")
        text = stream.read()

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            refuse(file, f"field {name!r:.100} is there twice")
        return fields

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        refuse(file, f"not JSON: {error}")
    if not isinstance(value, dict):
        refuse(file, "must hold a JSON object")
    return value
