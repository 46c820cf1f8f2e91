"""Each CUDA kernel has a name of its own, so that a profile or an error names one kernel."""

import re
from collections import Counter
from pathlib import Path

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCES = "\n".join(path.read_text() for path in sorted(CUDA.rglob("*.cu*")))
# A kernel is a struct with a `name` and a `run`; the rules of the slots' update name the kernels that follow them.
KERNEL = re.compile(r"^struct (\w+) \{(?:(?!^\};).)*?static constexpr const char\* name = ([^;]+);", re.MULTILINE | re.DOTALL)
NAMES = [name for _, name in KERNEL.findall(SOURCES) if name.startswith('"')]
NAMES += re.findall(r'"\w+"', " ".join(re.findall(r"KernelNames names = \{([^}]+)\}", SOURCES)))


def test_no_two_kernels_share_a_name():
    structs = [  # those of a family lie in its namespace
        (path.parent.name, struct) for path in sorted(CUDA.rglob("*.cu*")) for struct, _ in KERNEL.findall(path.read_text())
    ]
    assert len(structs) > 12 and len(NAMES) > 12
    assert not [name for name, count in Counter(structs + NAMES).items() if count > 1]


def test_names_are_stems():
    """Words in lower case, of a function that `_C` exports, and the family where it is not the portable one.

    The codes of the docs (K1, D2, U) are no names.
    """
    stems = "glu_ffn|glu_activation|neuron_importance|token_nll|rms_norm|layer_norm|rotary"
    stems += "|adamw_slots|sgd_slots|write_slots|add_slices|peer_sum"
    assert not [name for name in NAMES if not re.fullmatch(rf'"({stems})(_[a-z]+)*(_sm90)?"', name)]
