"""Batch norms in a traced program: what each of them normalises, and which layer it can be folded into."""
