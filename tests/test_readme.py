"""The README's Python runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import torch

import pygen.diffusers  # noqa: F401  (as whoever swaps schedulers does)
from tests.decoder_families import made
from tests.test_pipelines import embeddings, stable_diffusion

ROOT = Path(__file__).resolve().parent.parent


def test_examples_run(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    first, loop, images, server, pipeline, denoiser, model, decoder, language = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["digits"].shape == (100, 1, 8, 8)
    assert names["digits"].abs().max() <= 1.0 + 1e-6
    names |= {"latents": torch.randn(2, 4, 8, 8), "text": 1.0, "empty": 0.5, "unet": lambda x, t, scale: scale * x}
    exec(loop, names)
    assert names["latents"].isfinite().all()
    exec(images, names)
    for name in ("varied", "redrawn", "repainted"):
        assert names[name].shape == (4, 1, 8, 8)
        assert names[name].abs().max() <= 1.0 + 1e-6
    for name in ("redrawn", "repainted"):
        assert torch.equal(names[name][..., :4], names["few"][..., :4])
    exec(server, names)
    assert not names["batch"].requests
    pipe = stable_diffusion(diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    names |= {"pipe": pipe, "text": embeddings(1, 7, 16), "empty": embeddings(1, 7, 16)}
    exec(pipeline, names)
    assert names["report"].replaced[0] == "scheduler: DDIMScheduler"
    assert names["image"].size == (32, 32)
    names["report"].undo()
    for part in ("unet", "vae"):
        getattr(pipe, part).save_pretrained(tmp_path / part)
    exec(denoiser, names | {"folder": tmp_path})
    exec(model, names)
    assert len(names["two"].tokens) == 20
    assert names["one"].ended in ("length", "stop")
    assert names["logits"].shape == (1, 257)
    exec(decoder, names)
    assert names["lengths"].tolist() == [16] * 4
    assert names["logits"].isfinite().all()
    ids = torch.tensor([[84, 104, 101]])
    names |= {"model": made("llama-3"), "tokenizer": lambda text, return_tensors: {"input_ids": ids}}
    exec(language, names)
    assert names["report"].replaced == [
        "generate: method", "attention", "rotary embedding (3)", "gated MLP (3)", "RMSNorm (7)",
    ]  # fmt: skip
    assert names["ids"].shape == (1, 35)
