"""How is one of the study's methods trained? As score.py trains SCoRe, with `methods.Config`.

    python -m study.train --method star --iterations 5

`--help` has its settings. The run goes on with `python score.py --resume RUN`.
"""

import sys

from score import main
from study.methods import Config

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Config))
