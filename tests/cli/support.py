"""Stand-ins and readers for the tests of the command line."""

from __future__ import annotations

import json

import torch

from vit_engine.cli import child


def fake_interpret(error=0.0, calls=None):
    """What the child would answer, computed here by the torch backend, and as wrong as asked for."""

    def interpret(model, images, *, dtype, batch_size=8):
        if calls is not None:
            calls.append((dtype, len(images)))
        with torch.inference_mode():
            logits = model.float()(images)
        return child.Interpreted(logits + error, "interpret", 0.25)

    return interpret


def only_object(result):
    """What --json printed, which must be one line."""
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)
