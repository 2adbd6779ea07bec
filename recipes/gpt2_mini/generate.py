"""Open a converted checkpoint in a fresh process and let it write.

python recipes/gpt2_mini/generate.py checkpoints/gpt2-mini-d2dmoe
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import d2dmoe


def main() -> None:
    """Greedy text at each stored budget, and from the dense model."""
    folder = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/gpt2-mini-d2dmoe"
    prompt = " ".join(sys.argv[2:]) or "Once upon a time there was a little girl who"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    stored = [budget.active for budget in model.config.quantization_config.d2dmoe.budgets]
    for active in [1.0, *reversed(stored)]:
        with d2dmoe.set_gate(model, active=active):
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        label = "all experts (dense)" if active == 1 else f"{active:.0%} of the experts"
        print(f"--- {label}\n{tokenizer.decode(ids[0], skip_special_tokens=True)}\n")


if __name__ == "__main__":
    main()
