"""What is counted, pooled over the ranks, and given back to the routers.

In the order of events:

    recorder        decides whether a router call counts, and counts it once
    masks           which tokens of the call count, and which sequence each is in
    window          the open micro-batches and their calls; the last closed window
    call            one counted call, with its mask and its sequences
    gradient        the losses: their value in the forward, their gradient when the backward runs
    loss_sums       the sums of a micro-batch that its losses are made of
    replay          recorded routing in place of a router's own
    exchange        the collectives of a window
    biases          layer groups; where each bias is kept, moved, written into its slot, adopted from it
    notices         what step() warns of
    window_metrics  figures of the last closed window
    state           what a checkpoint holds

And what they stand on: ``layout`` (the vector of counts, and what balancers count besides), ``pool`` (the ranks),
``start`` (which biases a model begins with), ``taps`` (put in by ``attach``, taken out by ``detach``).
docs/concepts/gradient.md draws the order of events, docs/development/counting.md has the reasons.
"""
