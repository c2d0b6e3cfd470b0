"""A sparse layer against the dense one it was made of, in time per activated FLOP: `python -m benchmarks.moe`.

Qwen2-0.5B's MLP (896 -> 4,864 -> 896) and the four experts, two of them active, that upcycling makes of it: forward and
backward over the same tokens, in float32 on one thread, with gradients of weights, router and input. A router of random
weights sends each token where it likes. FLOPs are those of the matrix products; the sparse layer's are of the two
experts that see a token, and its router. Layers are timed in turn, round by round; ratios are medians over rounds.
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Results, table, wants_json
from student_train.models.huggingface import import_transformers
from student_train.models.sparse_upcycling import ExpertSettings, make_sparse_config

WIDTH, INNER = 896, 4864
TOKENS = 1024
EXPERTS = ExpertSettings(num_experts=4, top_k=2, every=1)
IMPLEMENTATIONS = ("grouped_mm", "eager")  # of transformers; batched_mm copies the weights of an expert for each token
ROUNDS = 5


def make_layers() -> tuple[Any, Any, str]:
    """The dense MLP, the sparse one, and which implementation of experts a model takes unless told otherwise."""
    transformers = import_transformers()
    dense = transformers.Qwen2Config(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=14,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # the shared expert of no width
    models = [
        transformers.AutoModelForCausalLM.from_config(config) for config in (dense, make_sparse_config(dense, EXPERTS))
    ]
    layers = [model.model.layers[0].mlp.train() for model in models]
    return *layers, models[1].config._experts_implementation


def num_flops(*, sparse: bool) -> int:
    """Of the products of one token, forward and both backward ones."""
    one = 3 * 2 * WIDTH * INNER * 3
    return EXPERTS.top_k * one + 3 * 2 * WIDTH * EXPERTS.num_experts if sparse else one


def seconds_of(layer: Any, tokens: Tensor) -> float:
    """Of a forward and a backward pass, as the processor counts: what else runs on the machine matters little."""
    layer.zero_grad(set_to_none=True)
    inputs = tokens.clone().requires_grad_()
    started = time.process_time()
    layer(inputs).square().mean().backward()
    return time.process_time() - started


def measure() -> Results:
    """Time per activated FLOP of each implementation over the dense layer's."""
    torch.set_num_threads(1)
    dense, sparse, default = make_layers()
    tokens = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        chosen = sparse.gate(tokens.flatten(0, 1))[-1]
    load = torch.bincount(chosen.flatten(), minlength=EXPERTS.num_experts) / chosen.numel()
    names = tuple(dict.fromkeys((default, *IMPLEMENTATIONS)))
    seconds: dict[str, list[float]] = {name: [] for name in ("dense", *names)}
    for round_number in range(ROUNDS + 1):
        for name, taken in seconds.items():
            if name != "dense":
                sparse.experts.config._experts_implementation = name
            spent = seconds_of(dense if name == "dense" else sparse, tokens)
            if round_number:  # the first one warms up
                taken.append(spent)
    flops = num_flops(sparse=True) / num_flops(sparse=False)
    ratios = {
        name: [own / flops / base for own, base in zip(seconds[name], seconds["dense"], strict=True)] for name in names
    }
    rows = [
        [
            name,
            f"{statistics.median(each):.3f}",
            f"{min(each):.3f}-{max(each):.3f}",
            f"{statistics.median(seconds[name]):.3f}",
        ]
        for name, each in ratios.items()
    ]
    rows.append(["dense", "1", "", f"{statistics.median(seconds['dense']):.3f}"])
    print(table(["experts by", "time per FLOP over dense", "spread", "seconds"], rows))
    print(f"load of the experts: {', '.join(f'{share:.3f}' for share in load.tolist())}; a model takes {default}")
    results = Results("moe", {"time_per_flop_over_dense": statistics.median(ratios[default])})
    results.metrics |= {f"{name}_over_dense": statistics.median(each) for name, each in ratios.items()}
    results.details = {"seconds": seconds, "implementation": default, "load": load.tolist(), "tokens": TOKENS}
    return results


if __name__ == "__main__":
    as_json = wants_json("A sparse layer's time per activated FLOP over the dense layer's.")
    measure().print(as_json=as_json)
