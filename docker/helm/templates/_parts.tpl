{{/* What every Pod has: nobody's rights, no token of the cluster, no root. */}}
{{- define "fedlora.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .Values.user }}
  runAsGroup: {{ .Values.user }}
  fsGroup: {{ .Values.user }}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* What every container has, beside its image and command. */}}
{{- define "fedlora.container" -}}
imagePullPolicy: {{ .Values.images.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Memory is a limit, processors are asked for. */}}
{{- define "fedlora.resources" -}}
resources:
  limits: {memory: {{ .memory }}}
  requests: {memory: {{ .memory }}, cpu: {{ .cpu | quote }}}
{{- end }}

{{/* A service is asked whether it serves, as in docker/compose.yaml. */}}
{{- define "fedlora.alive" -}}
{{- $exec := printf "[python, /opt/fedlora/health.py, %s]" . -}}
startupProbe:
  exec: {command: {{ $exec }}}
  periodSeconds: 5
  timeoutSeconds: 20
  failureThreshold: 60
livenessProbe:
  exec: {command: {{ $exec }}}
  periodSeconds: 15
  timeoutSeconds: 20
  failureThreshold: 4
readinessProbe:
  exec: {command: {{ $exec }}}
  periodSeconds: 15
  timeoutSeconds: 20
{{- end }}

{{/* A volume of a StatefulSet: its name, class and size. */}}
{{- define "fedlora.claim" -}}
- metadata: {name: {{ .name }}}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with .class }}
    storageClassName: {{ . }}
    {{- end }}
    resources: {requests: {storage: {{ .size }}}}
{{- end }}
