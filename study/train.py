"""How is one of the study's methods trained? As score.py trains SCoRe, with `methods.Config`.

    python -m study.train --method star --iterations 5
    python -m study.train --help

The run goes on with `python score.py --resume RUN`, and is measured again by `python eval.py RUN`.
"""

import sys

from score import main
from study.methods import Config

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Config))
