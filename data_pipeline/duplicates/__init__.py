"""What stage `dedup` is made of: signatures, candidates, their check, the decision, and repeated spans."""
