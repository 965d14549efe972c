"""What the experts of a model do on text, whoever runs the model: the lab's evaluations and `equipoise audit`.

forwards, watched at the routers -> Watched, counts whose size no text changes -> plain numbers and words (audit.json)
"""
