"""What a run will cost before it starts: memory, communication, time, money, and the layout that fits."""
