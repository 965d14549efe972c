"""The lab trains small mixture-of-experts language models on real text, under any strategy and on equal terms."""
