"""Whether the LLM's states tell what an edit shows: `python docs/edit_tags.py RUN STAGE` prints shares by kind of edit.

The tags (shape, color, size; for a background edit the background) are read off the LLM's last states at the image's
tokens, as in training (`TagWordsObjective.edit_tags`), on the first instructions of Shapes-Edit and Shapes-Edit-Bind.
Printed are the shares of changed and of kept tokens whose tags are right, and of items with over 0.6 and 0.8 of them.
No image is drawn.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spar.evaluation.options import EvalOptions
from spar.evaluation.shapes_edit import EditItem, edit_items
from spar.models.attention import attention_bias, position_ids_from_mask
from spar.processing.images import to_tensor
from spar.processing.prompts import PromptEncoder
from spar.recipes import REGISTRY
from spar.recipes.shapes.data import dense_tags
from spar.recipes.shapes.dense_tagging import dense_head
from spar.training.initial_weights import load_previous_weights, random_modules
from spar.training.modules import TrainingModules
from spar.training.run_folder import read_recipe

ITEMS = 24  # of a kind
CHANGED, KEPT = 0.6, 0.8  # least shares of right tokens of an item that counts as right
TAGS = ("shape", "color", "size")


@torch.inference_mode()
def shares(modules: TrainingModules, prompts: PromptEncoder, item: EditItem) -> tuple[float, float]:
    """The shares of right tokens among those that the edit changes, and among the other tokens of objects."""
    model, grid = modules.model, modules.config.grid
    tokens = prompts.edit([item.edit.instruction])
    embeddings = model.embed(tokens.ids, model.tokenizer.encoder(to_tensor([Image.fromarray(item.image)])))
    bias = attention_bias(tokens.mask, embeddings, causal=True)
    states, _ = model.language(embeddings, bias, position_ids_from_mask(tokens.mask))
    seen = states[tokens.ids == modules.config.text.image_token_id]                      # [N, D]
    after, before = (dense_tags([scene], grid) for scene in (item.edit.target, item.scene))
    names = ("background",) if item.edit.kind == "background" else TAGS
    told = {name: dense_head(modules).tags[name](seen).argmax(-1) for name in names}
    right = torch.stack([told[name] == after[name][0] for name in names]).all(0)         # [N]
    changed = torch.stack([after[name][0] != before[name][0] for name in names]).any(0)
    kept = (after["shape"][0] > 0) & ~changed
    return tuple(float(right[where].double().mean()) if where.any() else 1.0 for where in (changed, kept))


def main() -> None:
    run, stage = Path(sys.argv[1]), sys.argv[2]
    recipe = read_recipe(run / "recipe.json", REGISTRY)
    modules = random_modules(recipe, torch.device("cpu"), {})
    load_previous_weights(modules, run / stage / "done")
    prompts = recipe.prompts(recipe.data.text_tokenizer())
    for benchmark in ("shapes-edit", "shapes-edit-bind"):
        found = defaultdict(list)
        for item in edit_items(EvalOptions(limit=ITEMS), benchmark):
            changed, kept = shares(modules.eval(), prompts, item)
            found[item.edit.kind].append((changed, kept, changed > CHANGED and kept > KEPT))
        for kind, rows in found.items():
            changed, kept, whole = np.mean(np.array(rows, float), axis=0)
            print(f"{benchmark} {kind}: changed {changed:.2f}, kept {kept:.2f}, items {whole:.2f}")


if __name__ == "__main__":
    main()
