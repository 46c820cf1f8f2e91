"""What the tests of `locas perplexity` share: its call and its options."""

import json

from locas_ext.cli import main
from locas_ext.evaluation.assets import MODEL

OPTIONS = [
    "--model",
    str(MODEL),
    "--window",
    "64",
    "--stride",
    "32",
    "--rank",
    "4",
    "--scale",
    "host",
    "--device",
    "cpu",
    "--temp-lora-rank",
    "2",
    "--temp-lora-lr",
    "1e-3",
    "--max-tokens",
    "300",
]
ALL = ["--methods", "truncation,locas,temp-lora,long-context", "--long-context", "128"]


def perplexity(books, out, *options):
    return main([str(argument) for argument in ("perplexity", *books, *OPTIONS, "--out", out, *options)])


def results_of(folder):
    return json.loads((folder / "results.json").read_text())
