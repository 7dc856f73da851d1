# Completes commands, flags and their values after `python -m experiments.` in bash and zsh.
# In the repository: source docs/completion.sh

_experiments_commands() { "$1" -m experiments | awk '/^python -m/ { print $3 }'; }

# The script that tyro writes: python, command, shell. A description in several lines would be
# taken for several completions.
_experiments_script() {
    "$1" -m "$2" --tyro-print-completion "$3" | sed '/^COMPLETION_SPEC/s/\\n/ /g'
}

# The script is evaluated once for each command. It expects words without `python -m`.
if [[ -n ${ZSH_VERSION:-} ]]; then
    _experiments() {
        local python=$words[1] name=$words[3] complete
        if [[ $words[2] == -m && $CURRENT == 3 ]]; then
            compadd -- $(_experiments_commands $python)
        elif [[ $name == experiments.* ]]; then
            complete=_tyro_python__m_${name//./_}
            words=("$name" "${words[@]:3}")
            CURRENT=$((CURRENT - 2))
            if typeset -f $complete >/dev/null; then
                $complete
            else
                eval "$(_experiments_script $python $name zsh)" # ends with a call
            fi
        else
            _default
        fi
    }
    compdef _experiments python python3
else
    _experiments() {
        local name=${COMP_WORDS[2]} complete
        if [[ ${COMP_WORDS[1]} == -m && $COMP_CWORD == 2 ]]; then
            mapfile -t COMPREPLY < <(compgen -W "$(_experiments_commands "$1")" -- "$name")
        elif [[ $name == experiments.* ]]; then
            complete=_tyro_python__m_${name//./_}
            if ! declare -F "$complete" >/dev/null; then
                eval "$(_experiments_script "$1" "$name" bash)"
                complete -o default -F _experiments python python3 # the script replaces it
            fi
            COMP_WORDS=("$name" "${COMP_WORDS[@]:3}")
            ((COMP_CWORD -= 2))
            "$complete"
        fi
    }
    complete -o default -F _experiments python python3
fi
