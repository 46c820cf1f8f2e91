"""What the tests of studying share: a random host with the shipped tokenizer, and a small text."""

import torch
from transformers import AutoTokenizer

import locas_ext as locas
from locas_ext.evaluation.assets import MODEL

from .helpers import tiny_model

CHAT = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
TEXT = (
    "Captain Klau was born in Dublin, and nobody knew why he left it. The ship Vomel has red sails and a crew of nine. "
    "Every evening Doctor Prau played the violin for her guests. The village of Skolm lives from its trade in honey. "
    "Rain fell on the roofs all day long. The house of Brann has a heron on its coat of arms."
)
PAIRS = [
    ("Where was Klau born?", "Dublin"),
    ("What color are the sails of the Vomel?", "red"),
    ("What does Doctor Prau play?", "violin"),
    ("What does Skolm sell?", "honey"),
]


def study_tokenizer(chat=None):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = chat
    return tokenizer


def study_host(seed=0, **settings):
    fields = dict(vocab_size=4096, max_position_embeddings=256, num_hidden_layers=1, eos_token_id=0)
    return tiny_model("qwen3", seed=seed, **{**fields, **settings})


def studying(seed=0, **settings):
    """-> the host with a fresh memory."""
    return locas.attach(study_host(seed, **settings), locas.LocasConfig(rank=8, scale=2.0))


def answer_nats(model, tokenizer, pairs=PAIRS):
    """The mean negative log-likelihood of the answers' tokens after their plain questions."""
    total, count = 0.0, 0
    for question, answer in pairs:
        prompt = tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
        ids = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total, count = total - logits[range(len(ids)), ids].sum().item(), count + len(ids)
    return total / count
