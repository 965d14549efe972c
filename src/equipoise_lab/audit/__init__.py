"""`equipoise audit`: what the experts of a model do on text.

text by domain -> tokens -> forwards, watched at the routers -> Watched, counts whose size no text changes
"""
