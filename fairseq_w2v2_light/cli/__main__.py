"""`python -m fairseq_w2v2_light.cli`: the console command without its installation."""

import sys

from fairseq_w2v2_light.cli.main import main

sys.exit(main())
