"""Which tokens a pass edits: knows no adapter and no maths."""
