"""The tasks by name, and which variant of each is asked: its standard split, in the prompt it is known by."""

MMLU, LAMBADA = "mmlu", "lambada"
REQUESTS = {
    "arc_easy": "arc_easy/test_rc_5shot",
    "arc_challenge": "arc_challenge/test_rc_5shot",
    "hellaswag": "hellaswag/rc_0shot",
    "piqa": "piqa/rc_0shot",
    "winogrande": "winogrande/rc_0shot",
    "boolq": "boolq/rc_0shot",
    LAMBADA: "lambada/bpb_0shot",
}
TASKS = (MMLU, *REQUESTS)
NORMALIZED = ("arc_easy", "arc_challenge", "hellaswag", "piqa")  # their standard is accuracy by length too
