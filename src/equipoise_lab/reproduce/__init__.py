"""`equipoise reproduce`: tests the claims of the papers with paired seeds, at the size of a laptop. Imports no torch.

claims/*.toml -> claim.py -> runs.py -> verdict.py -> page.py; command.py calls them in this order.
"""
