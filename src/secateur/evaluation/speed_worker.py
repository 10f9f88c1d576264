"""One model in a process of its own, timed on request: JSON lines in, JSON lines out (speed.py is the other side).

A process of its own, so that resident memory is the model's, and so that none runs on what another warmed up.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any


def main() -> None:
    """Load the model named in JSON on the command line, answer with its memory, then with seconds for every request."""
    options = json.loads(sys.argv[1])
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a model's code and its libraries print is no answer
    sys.stdout = sys.stderr
    try:
        model, loaded = _load(options)
        print(json.dumps(loaded), file=answer, flush=True)
        for line in sys.stdin:
            print(json.dumps(_generate(model, **json.loads(line))), file=answer, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}), file=answer, flush=True)


def _load(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    from ..errors import ModelError
    from ..models.memory import give_back_memory
    from ..models.source import load_model, read_config, why_unmakeable
    from ..runtime.arrangement import arrangement, optimize

    torch.set_num_threads(options["threads"])
    directory, trusted = Path(options["directory"]), options["trust_remote_code"]
    with torch.device("meta"):  # so that the model's code is loaded before memory is read
        config = read_config(directory, trusted)
        try:
            AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        except Exception as error:
            raise ModelError(f"config.json describes no model ({why_unmakeable(config, error)})") from None
    before = psutil.Process().memory_info().rss
    model: Any = load_model(directory, options["dtype"], trusted)
    model.eval()
    if options["packed"]:
        optimize(model, prefer=options["prefer"], activations=options["activations"])
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.view(-1)[::1024].sum()  # touched, so that mapped pages count
    give_back_memory()
    loaded = {
        "resident_bytes": psutil.Process().memory_info().rss - before,
        "dtype": str(model.dtype).removeprefix("torch."),
        "arrangement": arrangement(model) if options["packed"] else None,
    }
    return model, loaded


def _generate(model: Any, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Seconds to the first token, and from each token to the next."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    moments: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **others: Any) -> Any:
            moments.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, prompt), generator=generator)
    started = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, pad_token_id=0, stopping_criteria=StoppingCriteriaList([Clock()]),
    )  # fmt: skip
    steps = [after - before for before, after in pairwise(moments)]
    return {"prefill": moments[0] - started, "decode": steps}


if __name__ == "__main__":
    main()
