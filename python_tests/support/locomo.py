"""What the tests of `locas locomo` share: a plain answer to compare with."""

import torch


def plain_answer(model, tokenizer, prompt, max_new_tokens):
    """One question by transformers' own greedy generate; the line is cut out afterwards."""
    with torch.inference_mode():
        output = model.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return tokenizer.decode(output[0, len(prompt) :].tolist(), skip_special_tokens=True).strip().split("\n")[0].strip()
