"""`equipoise audit`: what the experts of a model do on text.

text by domain -> tokens -> forwards, watched at the routers -> RouterCounts, independent of the amount of text
"""
