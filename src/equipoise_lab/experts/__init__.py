"""What a model's experts do on text. Shared by the lab's evaluations and `equipoise audit`.

forwards, watched at the routers -> RouterCounts, independent of the amount of text -> numbers and words (audit.json)
"""
