"""EleutherAI's lm-evaluation-harness on this runtime (`pip install lm_eval`).

python examples/lm_eval_adapter.py [MODEL_FOLDER [TASK,TASK]]
"""

import sys

import torch

import exl_runtime as exl

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
except ImportError:  # the class works without the harness, only nobody asks it
    LM = object


class ExlLM(LM):
    """One model for the harness; its tokens, prefixes and windows are those of the harness's own Hugging Face model."""

    def __init__(self, model: str = "demo", **options) -> None:
        super().__init__()
        self.rt = exl.load(model, **options)
        self.first = self.rt.tokenizer.encode("", add_bos=True) or [self.rt.tokenizer.eos_id]

    def score(self, context: list[int], wanted: list[int]) -> tuple[float, bool]:
        ids = (context + wanted)[-self.rt.info.context - 1 : -1]
        scores = torch.log_softmax(self.rt.logits(ids)[-len(wanted) :].double(), dim=-1)
        return scores[range(len(wanted)), wanted].sum().item(), scores.argmax(dim=-1).tolist() == wanted

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        return [self.continuation(*request.args) for request in requests]

    def continuation(self, context: str, text: str) -> tuple[float, bool]:
        before = self.rt.tokenizer.encode(context.rstrip(), add_bos=None)  # a blank belongs to the word behind it
        return self.score(before or self.first, self.rt.tokenizer.encode(context + text, add_bos=None)[len(before) :])

    def loglikelihood_rolling(self, requests) -> list[float]:
        return [self.rolling(self.first + self.rt.tokenizer.encode(*request.args)) for request in requests]

    def rolling(self, ids: list[int]) -> float:
        size = self.rt.info.context
        return sum(self.score(ids[:i], ids[i : i + size])[0] for i in range(1, len(ids), size))

    def generate_until(self, requests) -> list[str]:
        return [self.reply(*request.args) for request in requests]

    def reply(self, context: str, wish: dict) -> str:
        drawn = exl.SamplingParams(temperature=wish.get("temperature", 0) if wish.get("do_sample") else 0)
        most, stop = wish.get("max_gen_toks", 256), wish.get("until") or ()
        return self.rt.generate(context, max_tokens=most, stop=stop, sampling=drawn, overflow="drop").text


if __name__ == "__main__":
    lm = ExlLM(sys.argv[1] if len(sys.argv) > 1 else "demo")
    print("log-likelihood:", lm.continuation("The capital of France is", " Paris."))
    if len(sys.argv) > 2:
        print(simple_evaluate(model=lm, tasks=sys.argv[2].split(","))["results"])
