"""Processes forked from a server that has imported torch, transformers and the library once, so that a start costs little."""

import multiprocessing

IMPORTED_ONCE = [
    *("torch", "torch.distributed.tensor", "torch.distributed.fsdp", "transformers", "transformers.modeling_utils"),
    *("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3", "locas_ext"),
]


def forked(target, *arguments):
    """A process that runs target(*arguments), not yet started. Both are pickled: target stands at the top of its file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context.Process(target=target, args=arguments, daemon=True)
