"""How figures look, and grids of images."""

import logging

# Without a home it makes a cache of its own, and would say so on every command's stderr.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
