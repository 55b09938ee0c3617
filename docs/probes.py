"""Where a model of the shapes world loses what it should bind: `python docs/probes.py [MODEL]` prints four probes.

1. After an edit prompt the LLM says in words what the target shows: the share of exact descriptions for each kind of
   edit, on Shapes-Edit and on Shapes-Edit-Bind. What it can't say, the DiT can't read from its states.
2. The router: the mean weight of each layer, and the mean entropy in nats, over the tokens of 80 prompts.
3. Shapes-Gen with the router, and with the plain mean of the layers in its place.
4. What a ridge regression reads off each routed layer's states at nouns ("a small red circle, a large blue star and
   ..."): the share of sizes, colours and shapes that are those of the noun, on nouns that it has not seen.
"""

import sys
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from spar.evaluation.options import EvalOptions, is_understood
from spar.evaluation.shapes_edit import EditItem, edit_items
from spar.evaluation.shapes_gen import gen_prompts, shapes_gen
from spar.inference.pipeline import SparPipeline
from spar.models.attention import attention_bias, position_ids_from_mask
from spar.models.router import Router
from spar.processing.images import to_tensor
from spar.worlds.shapes.captions import describe
from spar.worlds.shapes.scene import COLORS, SHAPES, SIZES

ITEMS = 40  # of a kind or task
ANSWER = 48  # tokens
NOUN_PROMPTS = 600  # of three nouns each


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


@torch.inference_mode()
def read_at_nouns(pipe: SparPipeline, prompts: int) -> dict[int, dict[str, float]]:
    """For each routed layer, the share of each attribute that a linear read-out finds at the nouns of a third."""
    rng, model, tokenizer = np.random.default_rng(0), pipe.model, pipe.bundle.text_tokenizer
    attributes = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}
    looks = [
        [[names[rng.integers(len(names))] for names in attributes.values()] for _ in range(3)] for _ in range(prompts)
    ]
    phrases = [[f"a {size} {color} {shape}" for size, color, shape in row] for row in looks]
    tokens = pipe.prompts.generation([f"{a}, {b} and {c}" for a, b, c in phrases])
    embeddings, nouns = model.embed(tokens.ids, None), tokenizer.convert_tokens_to_ids([*SHAPES])
    bias, positions = attention_bias(tokens.mask, embeddings, causal=True), position_ids_from_mask(tokens.mask)
    _, states = model.language(embeddings, bias, positions, layers=model.layers)
    at_nouns, found = torch.isin(tokens.ids, torch.tensor(nouns)), {}
    for layer, state in zip(model.layers, states, strict=True):
        x = F.normalize(state[at_nouns].float(), dim=-1) * state.shape[-1] ** 0.5             # [nouns, D]
        x, known = torch.cat([x, torch.ones(len(x), 1)], dim=1), len(x) * 2 // 3
        found[layer] = {}
        for i, (attribute, names) in enumerate(attributes.items()):
            classes = torch.tensor([names.index(look[i]) for row in looks for look in row])
            seen, wanted = x[:known], F.one_hot(classes[:known], len(names)).float()
            weights = torch.linalg.solve(seen.T @ seen + torch.eye(x.shape[1]), seen.T @ wanted)
            found[layer][attribute] = float(((x[known:] @ weights).argmax(-1) == classes[known:]).float().mean())
    return found


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
    for layer, shares in read_at_nouns(pipe, NOUN_PROMPTS).items():
        print(f"layer {layer}, read at nouns:", ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))


if __name__ == "__main__":
    main()
