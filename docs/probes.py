"""Where a model of the shapes world loses what it should bind: `python docs/probes.py [MODEL]` prints three probes.

1. After an edit prompt the LLM says in words what the target shows: the share of exact descriptions for each kind of
   edit, on Shapes-Edit and on Shapes-Edit-Bind. What it can't say, the DiT can't read from its states.
2. The router: the mean weight of each layer, and the mean entropy in nats, over the tokens of 80 prompts.
3. Shapes-Gen with the router, and with the plain mean of the layers in its place.
"""

import sys
from collections import defaultdict

import torch
from PIL import Image

from spar.evaluation.options import EvalOptions, is_understood
from spar.evaluation.shapes_edit import EditItem, edit_items
from spar.evaluation.shapes_gen import gen_prompts, shapes_gen
from spar.inference.pipeline import SparPipeline
from spar.models.router import Router
from spar.processing.images import to_tensor
from spar.worlds.shapes.captions import describe

ITEMS = 40  # of a kind or task
ANSWER = 48  # tokens


@torch.inference_mode()
def said(pipe: SparPipeline, items: list[EditItem]) -> dict[str, float]:
    """The share of exact descriptions for each kind of edit; an instruction with unknown words is wrong."""
    right: dict[str, list[bool]] = defaultdict(list)
    for item in items:
        if not is_understood(pipe, item.edit.instruction):
            right[item.edit.kind].append(False)
            continue
        tokens = pipe.prompts.edit([item.edit.instruction])
        f_v = pipe.model.tokenizer.encoder(to_tensor([Image.fromarray(item.image)]))
        ids = pipe.model.language.generate(pipe.model.embed(tokens.ids, f_v), tokens.mask, max_new_tokens=ANSWER)
        text = pipe.bundle.text_tokenizer.decode(ids[0], skip_special_tokens=True).strip()
        right[item.edit.kind].append(text == describe(item.edit.target))
    return {kind: sum(values) / len(values) for kind, values in right.items()}


@torch.inference_mode()
def routing(pipe: SparPipeline) -> tuple[list[float], float]:
    """The mean weight of each routed layer and the mean entropy, over the real tokens of 80 prompts."""
    tokens = pipe.prompts.generation([prompt.text for prompt in gen_prompts(EvalOptions(limit=14))][:80])
    condition = pipe.model.condition(tokens.ids, tokens.mask)
    weights = condition.weights[condition.mask.bool()].float()
    return weights.mean(0).tolist(), float(-torch.special.xlogy(weights, weights).sum(-1).mean())


def main() -> None:
    pipe = SparPipeline.from_pretrained(*sys.argv[1:2], dtype=torch.float32, device="cpu")
    for benchmark in ("shapes-edit", "shapes-edit-bind"):
        shares = said(pipe, edit_items(EvalOptions(limit=ITEMS), benchmark))
        print(f"{benchmark}, said:", ", ".join(f"{kind} {share:.2f}" for kind, share in shares.items()))
    weights, entropy = routing(pipe)
    print(f"routing: {', '.join(f'{weight:.3f}' for weight in weights)}; entropy {entropy:.3f} nats")
    options = EvalOptions(limit=ITEMS, images_per_prompt=1)
    routed = shapes_gen(pipe, options).score("overall").value
    router: Router = pipe.model.router
    router.weights = lambda states: states.new_full((router.count,), 1 / router.count).expand(*states.shape[1:3], -1)
    print(f"shapes-gen: {routed:.3f} routed, {shapes_gen(pipe, options).score('overall').value:.3f} by the plain mean")


if __name__ == "__main__":
    main()
