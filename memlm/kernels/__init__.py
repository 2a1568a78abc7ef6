"""Operations on the value table: what a memory layer reads and how its rows are updated."""
