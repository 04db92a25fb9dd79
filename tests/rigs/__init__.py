"""Whole machines made of namespaces and containers, and the words of the docs typed on them. Most need root."""
