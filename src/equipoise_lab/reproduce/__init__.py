"""`equipoise reproduce`: what the papers claim, tested with paired seeds at the size of a laptop. Imports no torch.

claims/*.toml -> claim.py -> runs.py -> verdict.py -> page.py, in the order of command.py
"""
