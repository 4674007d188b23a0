{{- define "dijiang.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "dijiang.selector" -}}
app.kubernetes.io/name: dijiang
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "dijiang.labels" -}}
{{ include "dijiang.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "dijiang.keysSecret" -}}
{{- if .Values.keys.existingSecret -}}{{ .Values.keys.existingSecret }}
{{- else if .Values.keys.values -}}{{ include "dijiang.name" . }}-keys
{{- end -}}
{{- end -}}

{{- define "dijiang.storeSecret" -}}
{{- if .Values.states.existingSecret -}}{{ .Values.states.existingSecret }}
{{- else if .Values.postgresql.enabled -}}{{ include "dijiang.name" . }}-store
{{- end -}}
{{- end -}}

{{- define "dijiang.env" -}}
{{- range $name, $value := .Values.settings }}
- name: DIJIANG_{{ $name | upper }}
  value: {{ $value | quote }}
{{- end }}
{{- if .Values.model.existingClaim }}
- name: DIJIANG_MODEL
  value: /models/{{ .Values.model.path }}
{{- end }}
{{- if include "dijiang.keysSecret" . }}
- name: DIJIANG_API_KEYS_FILE
  value: /run/secrets/dijiang/api-keys
{{- end }}
{{- with include "dijiang.storeSecret" . }}
- name: DIJIANG_STATE_STORE
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: url
{{- end }}
{{- if include "dijiang.storeSecret" . }}
- name: DIJIANG_STATE_STORE_SCHEMA
  value: {{ .Values.states.schema | quote }}
{{- if .Values.states.bytes }}
- name: DIJIANG_STATE_STORE_BYTES
  value: {{ .Values.states.bytes | quote }}
{{- end }}
{{- end }}
- name: DIJIANG_STATES_FOLDER
  value: /states
- name: DIJIANG_DRAIN_TIMEOUT_S
  value: {{ .Values.drain.timeoutSeconds | quote }}
- name: DIJIANG_LOG_FORMAT
  value: json
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "dijiang.mounts" -}}
- name: states
  mountPath: /states
- name: tmp
  mountPath: /tmp
{{- if .Values.model.existingClaim }}
- name: model
  mountPath: /models
  readOnly: true
{{- end }}
{{- if include "dijiang.keysSecret" . }}
- name: keys
  mountPath: /run/secrets/dijiang
  readOnly: true
{{- end }}
{{- end -}}

{{- define "dijiang.volumes" -}}
- name: states
  emptyDir:
    sizeLimit: {{ .Values.states.size }}
- name: tmp
  emptyDir: {}
{{- if .Values.model.existingClaim }}
- name: model
  persistentVolumeClaim:
    claimName: {{ .Values.model.existingClaim }}
    readOnly: true
{{- end }}
{{- with include "dijiang.keysSecret" . }}
- name: keys
  secret:
    secretName: {{ . }}
{{- end }}
{{- end -}}
