"""`rkd suite`: attacks x defences x networks x data sets x seeds from one TOML file, to one table.

    suite file -> plan (teachers, students, controls) -> jobs, each an ordinary `rkd` command -> results/ -> table

A cell is a teacher's recipe (options of `rkd teacher`) and a student's (options of `rkd distill`). Its control is the
student of the same recipe and seed from the clean twin of the teacher; it knows no attack, so that one control serves
all of them and is scored under each trigger afterwards.
"""
