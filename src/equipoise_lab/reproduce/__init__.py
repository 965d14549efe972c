"""`equipoise reproduce`: tests the claims of the papers with paired seeds, at the size of a laptop. Imports no torch.

An edition (edition.py) is a set of claims with sizes, frontiers, pages and results of its own. command.py calls, in
this order: edition.py (with claim.py, arms.py and frontier.py) -> runs.py -> results.py -> verdict.py -> page.
"""
