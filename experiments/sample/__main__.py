"""Sample images from a full-precision or quantized model, on one process or on many.

    python -m experiments.sample model=rar_twin labels=3,7 n=16 format=png
    python -m experiments.sample quantized=exports/rar_twin labels=3,7 n=16 format=png
    torchrun --nproc_per_node 8 -m experiments.sample model=rar_b method=ptq4arvg eval=adm50k

Models, methods and samplers are chosen as for `experiments.run`, but without a method the model is
in full precision. With `quantized=` it is what `experiments.export` or `ptq.save` wrote, and runs
in integers: nothing is calibrated, and no full-precision checkpoint is read. `grid.png` shows the
first 64 images together.

Of w processes, on any number of nodes that share the folder, number r makes the micro-batches r, r
+ w, ...; each is a file of its own when finished. Killed runs continue there, and a larger n adds
to a smaller one. However many processes make the images, and after however many kills, they are the
same bytes (equal device, versions and threads).
"""

from __future__ import annotations

import sys

from experiments.config.overrides import RUN
from experiments.options import answer_help
from experiments.sample.options import Options, parse
from ptq.errors import user_errors


def main() -> None:
    with user_errors():
        answer_help(__doc__, {"Options": Options}, RUN.describe(method="fp"))
        options, overrides = parse(sys.argv[1:])

        # PyTorch is loaded for a command line that is allowed
        from experiments.sample.sampling import sample_together

        sample_together(options, overrides)


if __name__ == "__main__":
    main()
