"""Low-rank adapters: attach, save, merge."""

import logging

# peft imports bitsandbytes where it is installed, which warns of a kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
