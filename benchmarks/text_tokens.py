"""Text tokens a second of the language model's own `generate` against transformers', with the same weights.

Greedy, from embeddings, of the size of Qwen2.5-0.5B by default, random weights, bfloat16 where the CPU has it; both
take turns, and a ratio is the median of the rounds' own. The last line is JSON; ratios above 1 favour ours.

    python benchmarks/text_tokens.py --rounds 3
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch
from train_step import matmul_peak
from transformers import Qwen2ForCausalLM

from spar.checkpoints.model_header import versions
from spar.common.device import dtype_name, native_dtype
from spar.models.config import TextConfig
from spar.models.encoder import qwen_config
from spar.models.language import LanguageModel
from spar.training.bundle import hardware_info

QWEN_HALF_B = TextConfig(
    vocab_size=151_936, hidden_size=896, layers=24, heads=14, kv_heads=2, intermediate_size=4864, rope_theta=1e6,
    max_positions=4096, image_token_id=151_667, eos_token_id=151_645, pad_token_id=151_643,
)  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=QWEN_HALF_B.layers)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if min(args.layers, args.prompt, args.new, args.rounds) < 1:
        parser.error("expected numbers of at least 1")
    config = replace(QWEN_HALF_B, layers=args.layers)
    dtype = native_dtype(torch.device("cpu"))
    torch.manual_seed(0)
    ours = LanguageModel(config).to(dtype).eval().requires_grad_(False)
    for parameter in ours.parameters():
        parameter.normal_(std=0.02)
    theirs = Qwen2ForCausalLM(qwen_config(config)).to(dtype).eval().requires_grad_(False)
    theirs.model.load_state_dict(ours.network.state_dict())
    theirs.tie_weights()
    peak, rows = matmul_peak(torch.device("cpu")), {}
    for batch in (1, 8):
        words = torch.randn(batch, args.prompt, config.hidden_size).to(dtype)
        mask = torch.ones(batch, args.prompt, dtype=torch.long)

        def own(words: torch.Tensor = words, mask: torch.Tensor = mask) -> int:
            return sum(map(len, ours.generate(words, mask, max_new_tokens=args.new)))

        def other(words: torch.Tensor = words, mask: torch.Tensor = mask) -> int:
            made = theirs.generate(
                inputs_embeds=words, attention_mask=mask, max_new_tokens=args.new, min_new_tokens=args.new,
                do_sample=False,
            )
            return made.numel()

        own(), other()
        taken = []
        for _ in range(args.rounds):
            begun = time.perf_counter()
            count = own()
            middle = time.perf_counter()
            taken.append((count / (middle - begun), other() / (time.perf_counter() - middle)))
        rows[str(batch)] = {
            "tokens_per_second": statistics.median(one for one, _ in taken),
            "plain_tokens_per_second": statistics.median(one for _, one in taken),
            "ratio": statistics.median(one / two for one, two in taken),
        }
        print(f"batch {batch}: {rows[str(batch)]}", flush=True)
    print(json.dumps({
        "benchmark": "text_tokens", "layers": args.layers, "prompt": args.prompt, "new": args.new,
        "rounds": args.rounds, "parameters": sum(p.numel() for p in ours.parameters()), "dtype": dtype_name(dtype),
        "results": rows, "peak_gflops": peak / 1e9, "machine": hardware_info(), "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
