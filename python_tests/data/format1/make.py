"""Makes this folder's memories and expected results with the code of commit edae908; README.md says what they are for.

Run with that commit built and first on PYTHONPATH: python make.py. Every random number is drawn here and stored, so that a
test needs none of them again.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

import locas_ext as locas

COMMIT = "edae908"
HERE = Path(__file__).parent
VOCABULARY, WINDOW, STRIDE = 29, 24, 8
TOKENS, STOP = 93, 48  # the last chunk is a short one; the saved runs stopped behind STOP tokens

BACKPROP = {"learning_rate": 4e-3, "epochs": 1, "optimizer": "adamw"}
WRITE = {"epsilon": 1e-2, "tokens": "all", "capacity": 24, "when_full": "compress", "compress_to": 6}
CASES = {
    "glu": {"host": "qwen3", "variant": "glu", "optimizer": False, "backprop": BACKPROP},
    "glu_stopped": {"host": "qwen3", "variant": "glu", "optimizer": True, "backprop": BACKPROP},
    "mlp_stopped": {"host": "opt", "variant": "mlp", "optimizer": True, "backprop": BACKPROP},
    "written_stopped": {"host": "opt", "variant": "mlp", "optimizer": True, "write": WRITE},
}


def make_hosts() -> None:
    """Random models of two layers, as transformers' own folders."""
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    qwen3 = Qwen3Config(
        **sizes, intermediate_size=24, num_key_value_heads=1, head_dim=8, initializer_range=0.25, tie_word_embeddings=False
    )
    Qwen3ForCausalLM(qwen3).save_pretrained(HERE / "hosts" / "qwen3")
    opt = OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16, init_std=0.25, dropout=0.0)
    OPTForCausalLM(opt).save_pretrained(HERE / "hosts" / "opt")


def host(name: str):
    kind = {"qwen3": Qwen3ForCausalLM, "opt": OPTForCausalLM}[name]
    return kind.from_pretrained(HERE / "hosts" / name, dtype=torch.float32, local_files_only=True).eval()


def memorize(memory, case: dict, ids: torch.Tensor, **settings):
    update = case["backprop"] if "backprop" in case else {"update": "write", **case["write"]}
    return memory.memorize(ids, window=WINDOW, stride=STRIDE, progress=False, **update, **settings)


def used_slots(memory) -> torch.Tensor:
    """[L, planes, n, d]: without the rows that a memory which grows holds in reserve."""
    return memory.slots[:, :, : memory.status()[0].slots_used].detach().clone()


def run_to_the_end(name: str, case: dict, ids: torch.Tensor):
    """-> the report and the slots of going on from the saved folder; from one without a place, of a run from the start."""
    if not case["optimizer"]:
        memory = locas.load(host(case["host"]), HERE / name)
        return memorize(memory, case, ids), used_slots(memory)
    memory = locas.attach(host(case["host"]), locas.LocasConfig(variant=case["variant"], rank=4))
    report = memorize(memory, case, ids, resume=HERE / name)
    uninterrupted = locas.attach(host(case["host"]), locas.LocasConfig(variant=case["variant"], rank=4))
    assert memorize(uninterrupted, case, ids).chunks == report.chunks
    assert torch.equal(memory.slots, uninterrupted.slots)
    return report, used_slots(memory)


def make(name: str, case: dict, ids: torch.Tensor) -> tuple[dict, dict]:
    """Saves a memory stopped in the middle of the text. -> what is known of it, and the tensors it must lead to."""
    memory = locas.attach(host(case["host"]), locas.LocasConfig(variant=case["variant"], rank=4))

    def stop(chunk) -> None:
        if chunk.end == STOP:
            raise KeyboardInterrupt

    try:
        memorize(memory, case, ids, callback=stop)
    except KeyboardInterrupt:
        memory.save_pretrained(HERE / name, optimizer=case["optimizer"])
    with torch.no_grad():
        logits = memory.model(input_ids=ids[None, :WINDOW], use_cache=False).logits[0]
    report, slots = run_to_the_end(name, case, ids)
    known = {**case, "version": memory.version}
    tensors = {
        "saved_slots": used_slots(memory),
        "logits": logits,
        "slots": slots,
        "nll": torch.tensor([chunk.nll for chunk in report.chunks], dtype=torch.float64),
    }
    return known, {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def main() -> None:
    command = ["git", "-C", Path(locas.__file__).parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not commit.startswith(COMMIT) or commit.endswith("-dirty"):
        sys.exit(f"{locas.__file__} is of commit {commit or 'unknown'}; expected {COMMIT}: these are files of that version")
    torch.set_num_threads(1)
    for name in ("hosts", *CASES):
        shutil.rmtree(HERE / name, ignore_errors=True)
    make_hosts()
    # Half of it comes twice: there is something to learn.
    ids = torch.randint(3, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))
    ids[TOKENS // 2 : 2 * (TOKENS // 2)] = ids[: TOKENS // 2]
    known, expected = {}, {"ids": ids}
    for name, case in CASES.items():
        known[name], tensors = make(name, case, ids)
        expected |= tensors
    about = {"commit": COMMIT, "torch": torch.__version__, "window": WINDOW, "stride": STRIDE, "stop": STOP, "cases": known}
    (HERE / "cases.json").write_text(json.dumps(about, indent=1) + "\n")
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
