"""Many cases: worked through in processes that may die without taking the others' work with them."""
