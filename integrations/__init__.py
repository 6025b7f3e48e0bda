"""The toolkits: each package implements `cora_plugin.host.Host` for one of them."""

import logging


def _is_news(record: logging.LogRecord) -> bool:
    # Both toolkits import this module of torch, which warns where the variable
    # CUDA_HOME is set and there is no GPU: nothing that concerns a user of a CPU.
    return "No CUDA runtime is found" not in record.getMessage()


logging.getLogger("torch.utils.cpp_extension").addFilter(_is_news)
