"""`python -m training.audit`: see `training.audit.audit`."""

from training.audit.audit import main

main()
