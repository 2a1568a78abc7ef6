"""Where the facts of `data_modules.fact_questions.FactQuestions` come from, and how they are asked."""
