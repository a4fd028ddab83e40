"""The lab bench: what the units use and the student does not have to write.

Modules are imported one at a time (`from peftlab import llama`), so that importing the package costs no more than
importing torch.
"""

import logging

# Where a CPU has AVX-512 BF16, bitsandbytes asks for a package that would download kernels. Nothing here needs them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
